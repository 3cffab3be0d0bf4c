"""The output of the command on a terminal."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rai_toolbox.robustness._results import Curve
from rai_toolbox.robustness.command._job import Outcome
from rai_toolbox.robustness.command._options import as_flags
from rai_toolbox.robustness.report._compare import Comparison
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._report import checks_made, figure, percent
from rai_toolbox.robustness.run._run import Progress as Callback

_RAISED = ("warning", "distrust")

# A log is read later, and should not consist of this.
_SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def progress(*, shown: bool) -> Iterator[Callback | None]:
    """Show how far each stage is and the time left, on standard error: bars on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not shown:
        yield None
        return
    if not console.is_terminal:
        with _Lines() as lines:
            yield lines
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # The time left from all that is done: one batch may be all there is.
    with Progress(*columns, console=console, speed_estimate_period=600) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: float, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        # A stage is drawn when its first batch begins.
        vars(advance)["beat"] = advance
        vars(advance)["say"] = lambda words: bars.console.print(escape(as_flags(words)), soft_wrap=True)
        yield advance


class _Lines:
    """A line now and then: how far a stage is, and the time left, as far as something of it is done.

    A thread of its own prints them, so that one call of the model that takes minutes is no silence.
    """

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, float]] = {}
        self._at: tuple[str, float, int] | None = None
        self._told = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __call__(self, stage: str, done: float, total: int) -> None:
        """Take in that so many batches of a stage are done."""
        self.beat(stage, done, total)

    def beat(self, stage: str, done: float, total: int) -> None:
        """Take in that the model is at work on the next batch of a stage, and how much of it is done."""
        with self._lock:
            # What was done before a stage's first call here, by an earlier run, says nothing of the time it takes.
            self._begun.setdefault(stage, (time.monotonic(), done))
            self._at = stage, done, total
        self._tell()

    def say(self, words: str) -> None:
        """Print a line at once."""
        with contextlib.suppress(OSError):
            print(as_flags(words), file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._at is None or now - self._told < _SECONDS_BETWEEN_LINES:
                return
            self._told = now
            stage, done, total = self._at
            since, before = self._begun[stage]
        spent = now - since
        words = f"{_clock(spent)} since its start"
        if done > before:
            words = f"about {_clock(spent / (done - before) * (total - done))} left"
        share = f" and {100 * (done % 1):.0f} % of the next" if done % 1 >= 0.005 else ""
        with contextlib.suppress(OSError):
            print(f"{stage}: {int(done)} of {total}{share}, {words}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


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
        made = [finding for finding in evaluation.findings if finding.verdict != "not run"]
        if made:
            messages.print(f"checks: {checks_made(evaluation)}")
        else:
            why = evaluation.findings[0].summary if evaluation.findings else "--no-diagnostics left them out."
            messages.print(f"[yellow]not checked[/]: no check of the evaluation itself was made. {escape(why)}")
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
        names = comparison.names
        console.print(
            escape(
                f"accuracy under attack ({norm}); samples that only {names[0]} : only the other gets right, p-value"
            ),
            soft_wrap=True,
        )
        table = Table()
        for column in ("epsilon", *names):
            table.add_column(escape(column), justify="right")
        for point in points:
            shown = [_breakable(percent(accuracy)) for accuracy in point.accuracies]
            tests = [f"{test.only_first} : {test.only_second}, {test.p_value:.2g}" for test in point.tests]
            cells = (f"{accuracy}  ({test})" for accuracy, test in zip(shown[1:], tests, strict=True))
            table.add_row(f"{point.epsilon:g}", shown[0], *cells)
        console.print(table)
        for one in comparison.transfer:
            if one.norm == norm:
                words = f"epsilon {one.epsilon:g}: of {one.errors} errors of {one.source}, {one.transferred} are errors"
                console.print(escape(f"{words} of {one.target} too"), soft_wrap=True)
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
