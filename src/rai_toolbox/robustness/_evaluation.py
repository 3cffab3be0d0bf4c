"""The order of an evaluation: look at model and data, search, confirm, check, put together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rai_toolbox import evaluating
from rai_toolbox._version import __version__

from ._checks import Situation, run_check
from ._curves import accuracy_curve, error_curve
from ._errors import EvaluationFailed, InputError
from ._grid import grid_for_distances, grid_for_spread, widest_radius
from ._journal import Journal, Piece
from ._model_checks import MODEL_CHECKS
from ._preparation import prepare, run_key
from ._results import Curve, Evaluation, Examples, Finding
from ._samples import Summary
from ._search_checks import SEARCH_CHECKS
from ._settings import Norm, make_settings
from ._specs import why
from ._stages import Bench, clean, confirm, search
from ._team import Team, join

__all__ = ["Progress", "evaluate"]

#: Called as ``progress(stage, done, total)`` after each finished batch of a stage.
Progress = Callable[[str, int, int], None]

CHECKS = (*MODEL_CHECKS, *SEARCH_CHECKS)


def evaluate(
    model: nn.Module | Callable[[torch.Tensor], torch.Tensor],
    data: Any,
    *,
    norms: str | Sequence[str] = "l2",
    epsilons: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    extra_epsilons: Mapping[str, Sequence[float]] | None = None,
    task: str = "classification",
    bounds: Any = "auto",
    mask: Any = None,
    preprocess: Callable[[torch.Tensor], torch.Tensor] | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    diagnostics: bool = True,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    time_limit: float | None = None,
    progress: Progress | None = None,
    described: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure how robust a model is: its accuracy (or error) against the size of the worst perturbation.

    For each norm, the minimum-norm solver looks for the nearest error of every sample, which gives the whole
    curve; the fixed-budget solver then tries, at each reported epsilon, the samples that still stand. A
    sample counts as robust at an epsilon if neither found an error within it. Checks of the evaluation itself
    follow: see `Evaluation.findings`.

    The model is used in eval mode and left as it was. Under torchrun the batches are shared among the
    processes, and each returns the same result.

    Parameters
    ----------
    model : nn.Module or callable
        From a batch of inputs to logits, (N, classes), or (N,) or (N, 1) for two classes; for regression to
        values, (N, outputs) or (N,).
    data : (x, y), Dataset, DataLoader or Samples
        Inputs (N, ...) and labels (N,), or target values (N,) or (N, outputs).
    norms : str or sequence of str
        Of ``"l1"``, ``"l2"``, ``"linf"``, ``"l0"``.
    epsilons : sequence of float, or mapping from norm to such, optional
        The radii to report, in the units of the data. By default a grid that reaches to where nearly no sample stands.
    extra_epsilons : mapping from norm to sequence of float, optional
        Radii to report beside those, or beside the default grid.
    task : {"classification", "regression"}
        What the model predicts.
    bounds : "auto", None or (lower, upper)
        Where perturbed inputs may lie: numbers, or arrays in the shape of a sample. ``"auto"`` bounds images
        by [0, 1] or [0, 255].
    mask : array of bool, optional
        In the shape of a sample: True where the input may change.
    preprocess : callable, optional
        Applied to inputs before the model; epsilon stays in the units of the data.
    steps, restarts : int, optional
        Of the solvers; more of them can only lower the curve.
    batch_size : int
        Samples at a time. Memory grows with it; figures do not depend on it beyond rounding in the model.
    seed : int
        All random choices follow from it.
    device : torch.device or str, optional
        Where to compute; by default where the model is.
    diagnostics : bool
        Whether to check the evaluation itself.
    folder : path, optional
        Where finished batches are kept, so that a run that was ended can go on.
    resume, overwrite : bool
        Whether to go on with an unfinished run in `folder`, or to throw it away.
    time_limit : float, optional
        Seconds, after which no further batch is begun; the result then has ``complete == False``.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.
    described : mapping, optional
        What to say of model and data in the report.

    Returns
    -------
    Evaluation
        The curves, per-sample outcomes and findings; ``.save(folder)`` writes the report.

    Raises
    ------
    InputError
        If something given cannot be used; a `ValueError` whose message is one line.
    EvaluationFailed
        If the model or another process failed in the middle; finished batches are kept in `folder`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.robustness import evaluate
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> result = evaluate(lambda x: 3 * x, (x, x[:, 0] > 0), epsilons=[0.5], diagnostics=False)
    >>> [(point.epsilon, point.value) for point in result.curves["l2"].points]
    [(0.0, 1.0), (0.5, 0.5)]
    """
    settings = make_settings(
        task=task, norms=norms, epsilons=epsilons, extra_epsilons=extra_epsilons, steps=steps, restarts=restarts,
        batch_size=batch_size, seed=seed, diagnostics=diagnostics,
    )  # fmt: skip
    if time_limit is not None and not time_limit > 0:
        raise InputError(f"time_limit must be a number of seconds above 0, got {time_limit!r}")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    team = join()
    try:
        with torch.random.fork_rng(devices=[]):
            bench, summary = team.together(lambda: prepare(model, data, settings, bounds, mask, preprocess, device))
        key = run_key(bench, summary)
        if len(set(team.gather(summary.fingerprint))) > 1:
            raise InputError("the processes were given different data: their functions must return the same in each")
        journal = Journal(None if folder is None else Path(folder))
        team.leader_first(
            lambda: journal.begin(key, resume=resume or not team.leads, overwrite=overwrite and team.leads)
        )
        run = _Run(bench, summary, team, journal, deadline, progress)
        devices = [bench.device] if bench.device.type == "cuda" else []
        with evaluating(*bench.modules), torch.random.fork_rng(devices=devices):
            return run.all_stages(dict(described or {}))
    finally:
        team.leave()


@dataclass
class _Run:
    bench: Bench
    summary: Summary
    team: Team
    journal: Journal
    deadline: float | None
    progress: Progress | None
    complete: bool = True
    begun: float = field(default_factory=time.perf_counter)

    def all_stages(self, described: dict[str, Any]) -> Evaluation:
        bench, settings = self.bench, self.bench.settings
        looked = self.stage("clean", "Looking at the model", lambda batch: clean(bench, batch))
        self._refuse_nonfinite(looked)
        curves: dict[str, Curve] = {}
        distance: dict[str, NDArray] = {}
        error: dict[str, NDArray] = {}
        pieces: dict[str, list[list[Piece | None]]] = {}
        rejected = 0
        for norm in settings.norms:
            if bench.classifies:
                curve, distance[norm], found = self._classification(norm, looked)
            else:
                curve, error[norm], found = self._regression(norm, looked)
            curves[norm] = curve
            pieces[norm] = found
            rejected += sum(int(piece["rejected"]) for stage in found for piece in stage if piece is not None)
        findings = self._diagnose(curves, looked, distance, error, rejected)
        return self._result(described, looked, curves, distance, error, pieces, findings)

    def stage(self, name: str, words: str, work: Callable[[int], Mapping[str, Any] | None]) -> list[Piece | None]:
        """Do the batches that are not done yet, each in one of the processes; return all that are done, or
        None for the others.
        """
        count = self.bench.batches
        mine = self.team.mine(count)
        names = [f"{name}-{batch:07d}" for batch in range(count)]
        for done, batch in enumerate(mine):
            if self.deadline is not None and time.monotonic() > self.deadline:
                break
            if self.journal.get(names[batch]) is None:
                # What a random model draws is the batch's own, whoever does it and after what.
                torch.manual_seed(self.bench.generator(names[batch]).initial_seed())
                piece = self._guarded(lambda batch=batch: work(batch))
                if piece is None:
                    continue
                self.journal.put(names[batch], piece)
            if self.progress is not None and self.team.leads:
                self.progress(words, done + 1, len(mine))
        own = {names[batch]: piece for batch in mine if (piece := self.journal.get(names[batch])) is not None}
        for pieces in self.team.gather(own):
            self.journal.learn(pieces)
        results = [self.journal.get(name) for name in names]
        if any(result is None for result in results):
            self.complete = False
        return results

    def _guarded(self, work: Callable[[], Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
        try:
            return work()
        except (InputError, EvaluationFailed):
            raise
        except Exception as error:
            advice = "; lower --batch-size" if "memory" in str(error).lower() else ""
            raise EvaluationFailed(
                f"the model or a solver raised {why(error)}{advice}; finished batches are kept"
            ) from error

    def _refuse_nonfinite(self, looked: list[Piece | None]) -> None:
        finite = _join(looked, "finite")
        if len(finite) and not finite.any():
            raise InputError("the model's output is NaN or infinite for every sample")

    def _labels(self, pieces: list[Piece | None]) -> NDArray:
        """Return the targets of the samples whose batches are among the pieces."""
        spans = [self.bench.span(batch) for batch, piece in enumerate(pieces) if piece is not None]
        return np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, dtype=np.int64)

    def _classification(
        self, norm: Norm, looked: list[Piece | None]
    ) -> tuple[Curve, NDArray, list[list[Piece | None]]]:
        bench = self.bench

        def search_batch(batch: int) -> Mapping[str, Any] | None:
            first = looked[batch]
            return None if first is None else search(bench, norm, batch, first["correct"])

        searched = self.stage(f"search-{norm}", f"Searching the nearest errors ({norm})", search_batch)
        nearest = _join(searched, "distance")
        grid = bench.settings.grid(norm) or grid_for_distances(
            nearest, widest_radius(norm, self.summary, bench.box, bench.samples.shape)
        )
        grid = bench.settings.with_extra(norm, grid)

        def confirm_batch(batch: int) -> Mapping[str, Any] | None:
            found = searched[batch]
            return None if found is None else confirm(bench, norm, batch, grid, found["distance"])

        confirmed = self.stage(f"confirm-{norm}", f"Trying each epsilon ({norm})", confirm_batch)
        distance = _join([second or first for first, second in zip(searched, confirmed, strict=True)], "distance")
        where = self._labels(searched)
        forwards = sum(int(piece["forwards"]) for piece in (*searched, *confirmed) if piece is not None)
        curve = accuracy_curve(
            norm, grid, distance, nearest, bench.targets[where], self._class_names(), forwards,
            all(piece is not None for piece in confirmed),
        )  # fmt: skip
        full = np.full(len(bench.samples), np.nan)
        full[where] = distance
        return curve, full, [searched, confirmed]

    def _regression(self, norm: Norm, looked: list[Piece | None]) -> tuple[Curve, NDArray, list[list[Piece | None]]]:
        bench = self.bench
        grid = bench.settings.grid(norm) or grid_for_spread(norm, self.summary, bench.box)
        grid = bench.settings.with_extra(norm, grid)
        attacked = self.stage(
            f"confirm-{norm}",
            f"Trying each epsilon ({norm})",
            lambda batch: None if looked[batch] is None else confirm(bench, norm, batch, grid, None),
        )
        where = self._labels(attacked)
        full = np.full((len(grid) + 1, len(bench.samples)), np.nan)
        clean_error = _join(
            [first if second is not None else None for first, second in zip(looked, attacked, strict=True)], "error"
        )
        worst = np.concatenate(
            [piece["error"] for piece in attacked if piece is not None] or [np.zeros((len(grid), 0))], axis=1
        )
        # The unperturbed input is in every ball.
        full[:, where] = np.vstack([clean_error[None], np.maximum(worst, clean_error)])
        forwards = sum(int(piece["forwards"]) for piece in attacked if piece is not None)
        curve = error_curve(norm, grid, full[:, where], forwards, all(piece is not None for piece in attacked))
        return curve, full, [attacked]

    def _diagnose(
        self,
        curves: Mapping[str, Curve],
        looked: list[Piece | None],
        distance: Mapping[str, NDArray],
        error: Mapping[str, NDArray],
        rejected: int,
    ) -> tuple[Finding, ...]:
        if not self.bench.settings.diagnostics:
            return ()
        situation = Situation(
            self.bench,
            self.summary,
            curves,
            distance,
            error,
            _join(looked, "correct" if self.bench.classifies else "error"),
            rejected,
        )
        findings: dict[str, Finding] = {}
        words = "Checking the evaluation itself"
        for position in self.team.mine(len(CHECKS)):
            check = CHECKS[position]
            late = self.deadline is not None and time.monotonic() > self.deadline
            findings[check.name] = run_check(check, situation, self.journal, skip=late or not self.complete)
            if self.progress is not None and self.team.leads:
                self.progress(words, position // self.team.size + 1, len(self.team.mine(len(CHECKS))))
        for others in self.team.gather(findings):
            findings |= others
        return tuple(findings[check.name] for check in CHECKS if check.name in findings)

    def _class_names(self) -> tuple[str, ...]:
        if not self.bench.classifies:
            return ()
        names = self.bench.samples.class_names or ()
        count = int(self.bench.targets.max()) + 1
        return tuple(names[label] if label < len(names) else str(label) for label in range(max(count, len(names))))

    def _result(
        self,
        described: dict[str, Any],
        looked: list[Piece | None],
        curves: Mapping[str, Curve],
        distance: Mapping[str, NDArray],
        error: Mapping[str, NDArray],
        pieces: Mapping[str, list[list[Piece | None]]],
        findings: tuple[Finding, ...],
    ) -> Evaluation:
        bench = self.bench
        where = self._labels(looked)
        seconds = {
            f"{stage}_{norm}": sum(float(piece["seconds"]) for piece in done if piece is not None)
            for norm, stages in pieces.items()
            for stage, done in zip(("search", "confirm") if bench.classifies else ("confirm",), stages, strict=True)
        }
        labels = bench.targets[where]
        return Evaluation(
            task=bench.settings.task,
            complete=self.complete,
            curves=curves,
            findings=findings,
            index=where,
            label=labels,
            prediction=_join(looked, "prediction"),
            correct=_join(looked, "correct") if bench.classifies else np.zeros(0, dtype=bool),
            distance={norm: values[where] for norm, values in distance.items()},
            error={norm: values[:, where] for norm, values in error.items()},
            class_names=self._class_names(),
            settings=bench.settings.to_dict()
            | {"bounds": bench.box.to_dict(), "device": bench.device.type}
            | described,
            data={
                "samples": len(bench.samples),
                "evaluated": len(where),
                "shape": list(bench.samples.shape),
                "minimum": self.summary.minimum,
                "maximum": self.summary.maximum,
                "fingerprint": self.summary.fingerprint,
            },
            environment=_environment(bench, self.team),
            timings={"total": time.perf_counter() - self.begun, **seconds},
            examples={norm: examples for norm, stages in pieces.items() if (examples := self._examples(stages))},
            feature_names=bench.samples.feature_names,
        )

    def _examples(self, stages: list[list[Piece | None]]) -> Examples | None:
        kept: dict[int, tuple[NDArray, float, Any]] = {}
        for piece in (piece for stage in stages for piece in stage if piece is not None and "shown_index" in piece):
            for row, index in enumerate(piece["shown_index"].tolist()):
                kept[index] = (
                    piece["shown_input"][row],
                    float(piece["shown_distance"][row]),
                    piece["shown_prediction"][row],
                )
        if not kept:
            return None
        order = sorted(kept, key=lambda index: (kept[index][1], index))
        return Examples(
            index=np.array(order),
            original=self.bench.samples.gather(order).numpy(),
            perturbed=np.stack([kept[index][0] for index in order]),
            distance=np.array([kept[index][1] for index in order]),
            prediction=np.array([kept[index][2] for index in order]),
        )


def _join(pieces: list[Piece | None], name: str) -> NDArray:
    arrays = [piece[name] for piece in pieces if piece is not None]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _environment(bench: Bench, team: Team) -> dict[str, Any]:
    device = bench.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "rai_toolbox": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": team.size,
    }
