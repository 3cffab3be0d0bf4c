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

from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import CheckedResult, as_numpy, decisions, mean_absolute_error, run_solver
from rai_toolbox.robustness.attack._subject import Subject

__all__ = ["clean", "confirm", "search"]


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
        piece["correct"] = as_numpy(~misclassified(output, target) & finite)
    else:
        piece["prediction"] = as_numpy(output.double())
        piece["error"] = as_numpy(mean_absolute_error(output, target))
    return piece | {"seconds": time.perf_counter() - begun}


def search(subject: Subject, norm: Norm, batch: int, correct: NDArray) -> dict[str, Any]:
    """Return how far the nearest error is from each sample, from the minimum-norm solver.

    Parameters
    ----------
    correct : NDArray of bool
        Which samples of the batch the model gets right; the others are at distance 0.
    """
    begun, forwards = time.perf_counter(), subject.model.forwards
    start, stop = subject.span(batch)
    distance = np.where(correct, np.inf, 0.0)
    prediction = np.full(stop - start, -1)
    rows = np.flatnonzero(correct)
    kept = _Kept(subject, start, stop)
    rejected = 0
    if len(rows):
        x, target = (part[torch.from_numpy(rows)] for part in subject.batch(start, stop))
        found = run_solver(subject, x, target, norm=norm, purpose=("search", norm))
        distance[rows], prediction[rows], rejected = found.distance, found.prediction, found.rejected
        kept.take(rows, found)
    return {
        "distance": distance,
        "prediction": prediction,
        "rejected": rejected,
        "forwards": subject.model.forwards - forwards,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


def confirm(
    subject: Subject, norm: Norm, batch: int, grid: Sequence[float], open_below: NDArray | None
) -> dict[str, Any]:
    """Return the result of the fixed-budget solver at each radius.

    Parameters
    ----------
    grid : sequence of float
        The radii, ascending.
    open_below : NDArray or None
        Classification: the distance at which each sample is known to be broken (0: wrong from the start). A
        radius is tried on those that stand yet. Regression: None; each radius is tried on all.
    """
    begun, forwards = time.perf_counter(), subject.model.forwards
    start, stop = subject.span(batch)
    kept = _Kept(subject, start, stop)
    rejected = 0
    if open_below is None:
        error = np.zeros((len(grid), stop - start))
        x, target = subject.batch(start, stop)
        for level, epsilon in enumerate(grid):
            found = run_solver(subject, x, target, norm=norm, epsilon=epsilon, purpose=("confirm", norm, level))
            # A larger radius allows every change that a smaller one does.
            error[level] = found.error if level == 0 else np.maximum(error[level - 1], found.error)
            rejected += found.rejected
            if subject.cut:
                break
            if level == len(grid) // 2:
                kept.take(np.arange(stop - start), found)
        results: dict[str, Any] = {"error": error}
    else:
        distance = np.array(open_below, dtype=np.float64)
        prediction = np.full(stop - start, -1)
        for level, epsilon in enumerate(grid):
            rows = np.flatnonzero(distance > epsilon)
            if not len(rows):
                break
            x, target = (part[torch.from_numpy(rows)] for part in subject.batch(start, stop))
            found = run_solver(
                subject,
                x,
                target,
                norm=norm,
                epsilon=epsilon,
                purpose=("confirm", norm, level),
            )
            nearer = found.distance < distance[rows]
            distance[rows] = np.where(nearer, found.distance, distance[rows])
            prediction[rows] = np.where(nearer, found.prediction, prediction[rows])
            rejected += found.rejected
            kept.take(rows[nearer], found, nearer)
            if subject.cut:
                break
        results = {"distance": distance, "prediction": prediction}
    return results | {
        "rejected": rejected,
        "forwards": subject.model.forwards - forwards,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


class _Kept:
    """The perturbed inputs of a batch that the gallery may show."""

    def __init__(self, subject: Subject, start: int, stop: int) -> None:
        self._rows = {index - start for index in subject.shown if start <= index < stop}
        self._start = start
        self._found: dict[int, tuple[NDArray, float, NDArray]] = {}

    def take(self, rows: NDArray, found: CheckedResult, chosen: NDArray | None = None) -> None:
        at = np.flatnonzero(chosen) if chosen is not None else np.arange(len(rows))
        for row, position in zip(rows.tolist(), at.tolist(), strict=True):
            if row in self._rows and np.isfinite(found.distance[position]):
                perturbed = as_numpy(found.perturbed[position].float())
                self._found[row] = perturbed, float(found.distance[position]), found.prediction[position]

    def arrays(self) -> Mapping[str, NDArray]:
        rows = sorted(self._found)
        if not rows:
            return {}
        return {
            "shown_index": np.array(rows) + self._start,
            "shown_input": np.stack([self._found[row][0] for row in rows]),
            "shown_distance": np.array([self._found[row][1] for row in rows]),
            "shown_prediction": np.array([self._found[row][2] for row in rows]),
        }
