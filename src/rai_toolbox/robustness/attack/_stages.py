"""The stages of a run, for one batch: the unperturbed outputs, the search for the nearest error, a try at each radius.

Each function returns arrays, which the journal keeps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.robustness.attack._queries import nearest_by_queries, within_by_queries
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import (
    CheckedResult,
    as_numpy,
    decisions,
    errs,
    mean_absolute_error,
    run_solver,
)
from rai_toolbox.robustness.attack._subject import Subject


def clean(subject: Subject, batch: int) -> dict[str, Any]:
    """Return the model's predictions on the unperturbed inputs."""
    begun = time.perf_counter()
    x, target = subject.batch(*subject.span(batch))
    with torch.no_grad():
        output = subject.model(x)
    finite = output.isfinite().all(dim=1)
    piece = {"finite": as_numpy(finite)}
    if subject.classifies:
        piece["prediction"] = as_numpy(decisions(output))
        # A NaN among the logits is no right decision.
        piece["correct"] = as_numpy(~errs(subject, x, target, output) & finite)
    else:
        piece["prediction"] = as_numpy(output.double())
        piece["error"] = as_numpy(mean_absolute_error(output, target))
    return piece | {"seconds": time.perf_counter() - begun}


def search(subject: Subject, norm: Norm, batch: int, correct: NDArray) -> dict[str, Any]:
    """Return how far the nearest error is from each sample, from the minimum-norm solver.

    correct: which samples of the batch the model gets right; the others are at distance 0.
    """
    begun = time.perf_counter()
    start, stop = subject.span(batch)
    subject.begin(1.2 * subject.settings.sizes.steps * subject.settings.sizes.restarts * int(correct.sum()))
    distance = np.where(correct, np.inf, 0.0)
    prediction = np.full(stop - start, -1)
    rows = np.flatnonzero(correct)
    kept = _Kept(subject, start, stop)
    rejected = 0
    if len(rows):
        x, target = (part[torch.from_numpy(rows)] for part in subject.batch(start, stop))
        if subject.has_gradient:
            found = run_solver(subject, x, target, norm=norm, purpose=("search", norm))
        else:
            found = nearest_by_queries(subject, norm, x, target)
        distance[rows], prediction[rows], rejected = found.distance, found.prediction, found.rejected
        kept.take(rows, found)
    return {
        "distance": distance,
        "prediction": prediction,
        "rejected": rejected,
        "forwards": subject.model.forwards - subject.begun,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


def confirm(
    subject: Subject, norm: Norm, batch: int, grid: Sequence[float], open_below: NDArray | None
) -> dict[str, Any]:
    """Return the result of the fixed-budget solver at each radius.

    grid: the radii, ascending.
    open_below: classification: the distance at which each sample is known to be broken (0: wrong from the start). A
        radius is tried on those that stand yet. Regression: None; each radius is tried on all.
    """
    begun = time.perf_counter()
    start, stop = subject.span(batch)
    kept = _Kept(subject, start, stop)
    if open_below is None:
        subject.begin(len(grid) * (stop - start) * subject.settings.sizes.steps * subject.settings.sizes.restarts)
        results = _errors(subject, norm, grid, kept)
    else:
        standing = sum(int((open_below > epsilon).sum()) for epsilon in grid)
        subject.begin(standing * subject.settings.sizes.steps * subject.settings.sizes.restarts)
        results = _nearer_errors(subject, norm, grid, open_below, kept)
    return results | {
        "forwards": subject.model.forwards - subject.begun,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


def _errors(subject: Subject, norm: Norm, grid: Sequence[float], kept: _Kept) -> dict[str, Any]:
    """Try each radius on all samples of a batch."""
    begun = _begun(subject, kept)
    error = np.zeros((len(grid), kept.stop - kept.start)) if begun is None else np.array(begun["error"])
    rejected = 0 if begun is None else int(begun["rejected"])
    x, target = subject.batch(kept.start, kept.stop)
    for level in range(0 if begun is None else int(begun["levels"]), len(grid)):
        found = run_solver(subject, x, target, norm=norm, epsilon=grid[level], purpose=("confirm", norm, level))
        # A larger radius allows every change that a smaller one does.
        error[level] = found.error if level == 0 else np.maximum(error[level - 1], found.error)
        rejected += found.rejected
        if subject.cut:
            break
        if level == len(grid) // 2:
            kept.take(np.arange(len(x)), found)
        _keep_levels(subject, level + 1, {"error": error, "rejected": rejected}, kept)
    return {"error": error, "rejected": rejected}


def _nearer_errors(
    subject: Subject, norm: Norm, grid: Sequence[float], open_below: NDArray, kept: _Kept
) -> dict[str, Any]:
    """Try each radius on the samples of a batch that stand there yet."""
    begun = _begun(subject, kept)
    distance = np.array(open_below if begun is None else begun["distance"], dtype=np.float64)
    prediction = np.full(len(distance), -1) if begun is None else np.array(begun["prediction"])
    rejected = 0 if begun is None else int(begun["rejected"])
    for level in range(0 if begun is None else int(begun["levels"]), len(grid)):
        rows = np.flatnonzero(distance > grid[level])
        if not len(rows):
            break
        x, target = (part[torch.from_numpy(rows)] for part in subject.batch(kept.start, kept.stop))
        if subject.has_gradient:
            found = run_solver(subject, x, target, norm=norm, epsilon=grid[level], purpose=("confirm", norm, level))
        else:
            found = within_by_queries(subject, norm, x, target, grid[level], level=level, levels=len(grid))
        nearer = found.distance < distance[rows]
        distance[rows] = np.where(nearer, found.distance, distance[rows])
        prediction[rows] = np.where(nearer, found.prediction, prediction[rows])
        rejected += found.rejected
        kept.take(rows[nearer], found, nearer)
        if subject.cut:
            break
        results = {"distance": distance, "prediction": prediction, "rejected": rejected}
        _keep_levels(subject, level + 1, results, kept)
    return {"distance": distance, "prediction": prediction, "rejected": rejected}


_LEVELS = "levels"


def _begun(subject: Subject, kept: _Kept) -> Mapping[str, NDArray] | None:
    """Return what an earlier process has found at the first radii."""
    begun = None if subject.part is None else subject.part.get(_LEVELS)
    if begun is not None:
        subject.model.forwards = subject.begun + int(begun["forwards"])
        kept.restore(begun)
    return begun


def _keep_levels(subject: Subject, levels: int, results: Mapping[str, Any], kept: _Kept) -> None:
    if subject.part is not None:
        so_far = {"levels": levels, "forwards": subject.model.forwards - subject.begun, **results, **kept.arrays()}
        subject.part.put(_LEVELS, {name: np.asarray(value) for name, value in so_far.items()})


class _Kept:
    """The perturbed inputs of a batch that the gallery may show."""

    def __init__(self, subject: Subject, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._rows = {index - start for index in subject.shown if start <= index < stop}
        self._found: dict[int, tuple[NDArray, float, NDArray]] = {}

    def take(self, rows: NDArray, found: CheckedResult, chosen: NDArray | None = None) -> None:
        at = np.flatnonzero(chosen) if chosen is not None else np.arange(len(rows))
        for row, position in zip(rows.tolist(), at.tolist(), strict=True):
            if row in self._rows and np.isfinite(found.distance[position]):
                perturbed = as_numpy(found.perturbed[position].float())
                self._found[row] = perturbed, float(found.distance[position]), found.prediction[position]

    def restore(self, arrays: Mapping[str, NDArray]) -> None:
        """Take back what `arrays` has returned."""
        if "shown_index" in arrays:
            values = (arrays[f"shown_{name}"] for name in ("index", "input", "distance", "prediction"))
            self._found = {
                int(index) - self.start: (perturbed, float(distance), prediction)
                for index, perturbed, distance, prediction in zip(*values, strict=True)
            }

    def arrays(self) -> Mapping[str, NDArray]:
        rows = sorted(self._found)
        if not rows:
            return {}
        return {
            "shown_index": np.array(rows) + self.start,
            "shown_input": np.stack([self._found[row][0] for row in rows]),
            "shown_distance": np.array([self._found[row][1] for row in rows]),
            "shown_prediction": np.array([self._found[row][2] for row in rows]),
        }
