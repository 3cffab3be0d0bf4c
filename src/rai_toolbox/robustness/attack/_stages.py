"""The stages of a run, for one batch: the unperturbed outputs, the search for the nearest error, a try at each radius.

Each function returns arrays, which the journal keeps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.robustness.attack._grid import radii_between
from rai_toolbox.robustness.attack._kept import Kept
from rai_toolbox.robustness.attack._queries import nearest_by_queries, within_by_queries
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import (
    NAME,
    CheckedResult,
    as_numpy,
    breaks,
    decisions,
    errors_at,
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
        piece["errors"] = errors_at(subject, x, target, output)
        piece["correct"] = ~breaks(piece["errors"], subject.settings.draws) & as_numpy(finite)
    else:
        piece["prediction"] = as_numpy(output.double())
        piece["error"] = as_numpy(mean_absolute_error(output, target))
    return piece | {"seconds": time.perf_counter() - begun}


def search(subject: Subject, norm: Norm, batch: int, correct: NDArray) -> dict[str, Any]:
    """Return how far the nearest error is from each sample, from the minimum-norm solver.

    correct: which samples of the batch the model gets right; the others are at distance 0.
    """
    start, stop = subject.span(batch)
    subject.begin(1.2 * subject.settings.sizes.steps * subject.settings.sizes.restarts * int(correct.sum()))
    distance = np.where(correct, np.inf, 0.0)
    prediction, by = np.full(stop - start, -1), np.full(stop - start, "", NAME)
    errors = np.zeros(stop - start, np.int64)
    rows = np.flatnonzero(correct)
    kept = Kept(subject, batch)
    rejected = 0
    if len(rows):
        x, target = (part[torch.from_numpy(rows)] for part in subject.batch(start, stop))
        if subject.has_gradient:
            found = run_solver(subject, x, target, norm=norm, purpose=("search", norm))
        else:
            found = nearest_by_queries(subject, norm, x, target)
        distance[rows], prediction[rows], rejected = found.distance, found.prediction, found.rejected
        by[rows], errors[rows] = np.where(np.isfinite(found.distance), found.by, ""), found.errors
        kept.take(rows, found)
    return {
        "distance": distance,
        "by": by,
        "errors": errors,
        "prediction": prediction,
        "rejected": rejected,
        **subject.spent,
        **kept.arrays(),
    }


def confirm(
    subject: Subject, norm: Norm, batch: int, grid: Sequence[float], open_below: NDArray | None
) -> dict[str, Any]:
    """Return the result of the fixed-budget solver at each radius.

    grid: the radii, ascending.
    open_below: classification: the distance at which each sample is known to be broken (0: wrong from the start).
        Regression: None; each radius is tried on all.
    """
    start, stop = subject.span(batch)
    kept = Kept(subject, batch)
    if open_below is None:
        subject.begin(len(grid) * (stop - start) * subject.settings.sizes.steps * subject.settings.sizes.restarts)
        results = _errors(subject, norm, grid, kept)
    else:
        results = _nearer_errors(subject, norm, grid, open_below, kept)
    return results | {
        **subject.spent,
        **kept.arrays(),
    }


def _errors(subject: Subject, norm: Norm, grid: Sequence[float], kept: Kept) -> dict[str, Any]:
    """Try each radius on all samples of a batch."""
    shape = len(grid), kept.stop - kept.start
    so_far = _so_far(subject, kept, {"error": np.zeros(shape), "by": np.full(shape, "", NAME), "rejected": np.array(0)})
    error, by = so_far["error"], so_far["by"]
    x, target = subject.batch(kept.start, kept.stop)
    for level in range(int(so_far["levels"]), len(grid)):
        found = run_solver(subject, x, target, norm=norm, epsilon=grid[level], purpose=("confirm", norm, level))
        error[level], by[level] = found.error, found.by
        if level > 0:  # a larger radius allows every change that a smaller one does
            less = error[level] < error[level - 1]
            error[level, less], by[level, less] = error[level - 1, less], by[level - 1, less]
        so_far["rejected"] += found.rejected
        if subject.cut:
            break
        if level == len(grid) // 2 or subject.settings.keep_points:
            kept.take(np.arange(len(x)), found, level=level)
        _keep_levels(subject, level + 1, so_far, kept)
    return so_far


def _nearer_errors(
    subject: Subject, norm: Norm, grid: Sequence[float], open_below: NDArray, kept: Kept
) -> dict[str, Any]:
    """Try each sample of a batch a little below its nearest known error, until it stands.

    That is at the largest radius below, of the grid or between: where a sample stands, it stands in each smaller ball.
    A random model has a rate of errors at each radius of the grid, and queries have a budget for each: there each is
    tried, from the largest down, on those that are not known to be broken.
    """
    each = subject.settings.draws > 1 or not subject.has_gradient
    radii = np.array(grid if each else radii_between(norm, grid))
    tries = int((open_below > radii[:, None] if each else open_below > radii[0]).sum())
    subject.begin(tries * subject.settings.sizes.steps * subject.settings.sizes.restarts)
    count = len(open_below)
    first = {"distance": np.array(open_below, dtype=np.float64), "by": np.full(count, "", NAME)}
    first |= {"prediction": np.full(count, -1), "errors": np.zeros(count, np.int64), "rejected": np.array(0)}
    first |= {"errors_tried": np.full((len(grid), count), -1), "stands": np.zeros(count, dtype=bool)}
    so_far = _so_far(subject, kept, first)
    distance, stands = so_far["distance"], so_far["stands"]
    for number in range(int(so_far["levels"]), len(radii)):
        level = np.searchsorted(radii, distance) - 1
        if each:
            level = np.where(level < len(radii) - 1 - number, -1, len(radii) - 1 - number)
        rows = np.flatnonzero((level >= 0) & ~stands)
        if not len(rows):
            continue
        found = _within(subject, norm, kept, rows, radii, level[rows], number)
        nearer = found.distance < distance[rows]
        if each:
            so_far["errors_tried"][level[rows], rows] = found.errors
        else:
            stands[rows] = ~nearer
        for name in ("distance", "prediction", "by", "errors"):
            so_far[name][rows[nearer]] = getattr(found, name)[nearer]
        so_far["rejected"] += found.rejected
        kept.take(rows, found, nearer)
        if subject.cut:
            break
        _keep_levels(subject, number + 1, so_far, kept)
    return so_far


def _within(
    subject: Subject, norm: Norm, kept: Kept, rows: NDArray, radii: NDArray, level: NDArray, number: int
) -> CheckedResult:
    """Try some samples of a batch, each at a radius of its own; by queries: all at one."""
    x, target = (part[torch.from_numpy(rows)] for part in subject.batch(kept.start, kept.stop))
    if not subject.has_gradient:
        at = int(level[0])
        return within_by_queries(subject, norm, x, target, float(radii[at]), level=at, levels=len(radii))
    epsilon = torch.from_numpy(radii[level]).to(subject.device)
    return run_solver(subject, x, target, norm=norm, epsilon=epsilon, purpose=("confirm", norm, number))


_LEVELS = "levels"


def _so_far(subject: Subject, kept: Kept, first: dict[str, NDArray]) -> dict[str, NDArray]:
    """Return what an earlier process has found at the first radii, and how many they were; else what is given."""
    begun = None if subject.part is None else subject.part.get(_LEVELS)
    if begun is None:
        return first | {"levels": np.array(0)}
    subject.model.forwards = subject.begun + int(begun["forwards"])
    kept.restore(begun)
    return {name: np.array(begun[name]) for name in (*first, "levels")}


def _keep_levels(subject: Subject, levels: int, so_far: dict[str, NDArray], kept: Kept) -> None:
    so_far["levels"] = np.array(levels)
    if subject.part is not None:
        forwards = np.array(subject.model.forwards - subject.begun)
        subject.part.put(_LEVELS, {"forwards": forwards, **so_far, **kept.arrays()})
