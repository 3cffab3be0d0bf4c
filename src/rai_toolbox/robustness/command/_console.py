"""The output of the command on a terminal."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rai_toolbox.robustness._results import Curve
from rai_toolbox.robustness.command._job import Outcome
from rai_toolbox.robustness.report._compare import Comparison
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._report import figure, percent
from rai_toolbox.robustness.run._run import Progress as Callback

__all__ = ["progress", "report", "report_comparison"]


_RAISED = ("warning", "distrust")

# A log is read later, and should not consist of this.
_SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def progress(*, shown: bool) -> Iterator[Callback | None]:
    """Show how far each stage is and the time left, on standard error: bars on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield _Lines() if shown else None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, object] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        def beat(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                advance(stage, done, total)

        # A stage is drawn when its first batch begins.
        vars(advance)["beat"] = beat
        yield advance


class _Lines:
    """A line now and then: how far a stage is, and the time left, once a batch of it is done."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}
        self._told = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in that so many batches of a stage are done."""
        self.beat(stage, done, total)

    def beat(self, stage: str, done: int, total: int) -> None:
        """Take in that the model is at work on the next batch of a stage."""
        now = time.monotonic()
        # What was done before a stage's first call here, by an earlier run, says nothing of the time it takes.
        since, before = self._begun.setdefault(stage, (now, done))
        if now - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told = now
        spent = now - since
        if done > before:
            left = datetime.timedelta(seconds=round(spent / (done - before) * (total - done)))
            words = f"about {left} left"
        else:
            words = f"{datetime.timedelta(seconds=round(spent))} since its start"
        with contextlib.suppress(OSError):
            print(f"{stage}: {done} of {total}, {words}", file=sys.stderr, flush=True)


def report(outcome: Outcome, *, as_json: bool, quiet: bool) -> None:
    """Print the result: a table and the findings; or JSON on standard output, the rest on standard error."""
    evaluation = outcome.evaluation
    if as_json:
        print(evaluation.to_json())
    elif not quiet:
        console = Console()
        name = evaluation.settings.get("model", "the model")
        for curve in evaluation.curves.values():
            # Not as the table's title, which would be wrapped to its width.
            console.print(escape(f"{evaluation.measure} of {name} under attack ({curve.norm})"), soft_wrap=True)
            console.print(_table(evaluation, curve))
        if evaluation.corruptions:
            console.print(escape(f"{evaluation.measure} of {name} under corruptions"), soft_wrap=True)
            console.print(_corruptions(evaluation))
        console.print(_bounds(evaluation), soft_wrap=True)
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    if not quiet:
        for finding in evaluation.findings:
            if finding.verdict in _RAISED:
                color = "red" if finding.verdict == "distrust" else "yellow"
                word = "do not trust" if finding.verdict == "distrust" else "warning"
                messages.print(f"[{color}]{word}[/]: {escape(finding.summary)} \\[{finding.check}]")
        if not evaluation.complete:
            messages.print("[yellow]partial[/]: the time limit ended the run; go on with --resume")
        where = escape(str(outcome.folder / "report.html"))
        raised = any(finding.verdict in _RAISED for finding in evaluation.findings)
        messages.print(f"report: {where}{', with what each check means and what to do' if raised else ''}")
    for reason in outcome.reasons:
        print(f"error: {reason}", file=sys.stderr)


def report_comparison(comparison: Comparison, folder: Path, *, as_json: bool) -> None:
    """Print a comparison: a table per norm, or JSON."""
    if as_json:
        print(json.dumps(comparison.to_dict(), allow_nan=False))
        return
    console = Console()
    for norm, points in comparison.norms.items():
        console.print(f"accuracy under attack ({norm})")
        table = Table()
        for column in ("epsilon", *comparison.names, "only first", "only second", "p-value"):
            table.add_column(escape(column), justify="right")
        for point in points:
            test = point.test
            table.add_row(
                f"{point.epsilon:g}",
                _breakable(percent(point.first)),
                _breakable(percent(point.second)),
                str(test.only_first),
                str(test.only_second),
                f"{test.p_value:.2g}",
            )
        console.print(table)
    Console(stderr=True, soft_wrap=True).print(f"comparison: {escape(str(folder / 'comparison.html'))}")


def _table(evaluation: Evaluation, curve: Curve) -> Table:
    accuracy = evaluation.task == "classification"
    shown = percent if accuracy else figure
    table = Table()
    table.add_column("epsilon", justify="right")
    table.add_column(evaluation.measure, justify="right")
    table.add_column("95 % interval", justify="right")
    if curve.average:
        table.add_column("error at random points", justify="right")
    for point, mean in itertools.zip_longest(curve.points, curve.average):
        cells = [shown(point.value), f"{shown(point.low)} to {shown(point.high)}"]
        cells += [] if mean is None else [shown(mean.error)]
        table.add_row(f"{point.epsilon:g}", *map(_breakable, cells))
    return table


def _corruptions(evaluation: Evaluation) -> Table:
    shown = percent if evaluation.task == "classification" else figure
    table = Table()
    table.add_column("severity")
    rows = [(name, corruption.points) for name, corruption in evaluation.corruptions.items()]
    for point in rows[0][1]:
        table.add_column(f"{point.severity:g}", justify="right")
    for name, points in rows:
        table.add_row(escape(name), *(_breakable(shown(point.value)) for point in points))
    return table


def _bounds(evaluation: Evaluation) -> str:
    box = evaluation.settings["bounds"]
    lower, upper = box["lower"], box["upper"]
    if isinstance(lower, list) or isinstance(upper, list):
        applied = "one per feature"
    elif lower is None and upper is None:
        applied = "none: perturbed inputs may take any value"
    else:
        applied = f"{lower:g} to {upper:g}"
    frozen = f"; {box['frozen_features']} entries do not change" if box["frozen_features"] else ""
    return f"bounds ({box['chosen']}): {applied}{frozen}"


def _breakable(text: str) -> str:
    """Return a text with ordinary spaces, which every encoding has."""
    return text.replace("\u00a0", " ")
