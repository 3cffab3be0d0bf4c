"""Perturbed inputs of earlier evaluations, tried again: what was found once is not lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.robustness.attack._kept import Kept
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import NAME, CheckedResult, check_again
from rai_toolbox.robustness.attack._subject import EarlierPoints, Subject

#: The name of this way to find errors.
EARLIER = "also-try"


def try_earlier(
    subject: Subject, norm: Norm, batch: int, grid: Sequence[float], known: NDArray | None
) -> dict[str, Any]:
    """Return what earlier points are worth to this model: as they are, in the box, and in the ball of each radius.

    grid: the radii, ascending.
    known: the distance at which each sample of the batch is known to be broken; of a regression, None.

    Returns ``distance``, the least of what is known and what was found, shape (samples,), or ``error``, the largest
    found, shape (radii, samples); ``by``, the name of this attack where it found them; what a piece of a run holds.
    """
    kept = Kept(subject, batch)
    points = subject.earlier[norm]
    mine = np.flatnonzero((points.index >= kept.start) & (points.index < kept.stop))
    subject.begin(len(mine) * (1 + len(grid)))
    count = kept.stop - kept.start
    if known is None:
        tries = _Errors(count, kept, len(grid), keep_all=subject.settings.keep_points)
    else:
        tries = _NearestErrors(count, kept, known)
    for first in range(0, len(mine), subject.settings.batch_size):
        _try(subject, norm, points, mine[first : first + subject.settings.batch_size], grid, tries)
    return {
        **tries.found,
        "rejected": 0,
        **subject.spent,
        **kept.arrays(),
    }


def _try(
    subject: Subject, norm: Norm, points: EarlierPoints, chosen: NDArray, grid: Sequence[float],
    tries: _NearestErrors | _Errors,
) -> None:  # fmt: skip
    """Try some points as they are, and within each radius that they lie outside of."""
    chosen = chosen[tries.wants(points.index[chosen] - tries.kept.start, 0.0)]
    if not len(chosen):
        return
    rows, saved = points.index[chosen] - tries.kept.start, points.distance[chosen]
    x, target = (part[rows] for part in subject.batch(tries.kept.start, tries.kept.stop))
    there, bounds = torch.from_numpy(points.perturbed[chosen]).to(x), subject.box.of(x)
    if bounds is not None:  # every entry moves towards x: no norm grows
        there = torch.minimum(torch.maximum(there, bounds[0]), bounds[1])
    radius = torch.from_numpy(saved).to(x.device)
    as_they_are = check_again(subject, x, target, there, norm=norm, by=EARLIER, epsilon=radius)
    lower, upper = (None, None) if bounds is None else (bound.expand_as(x).flatten(1) for bound in bounds)
    for level, epsilon in enumerate(grid):
        tries.take(level, rows, as_they_are, np.flatnonzero(saved <= epsilon))
        outside = np.flatnonzero((saved > epsilon) & tries.wants(rows, epsilon))
        if len(outside):
            radius = torch.full((len(x), 1), float(epsilon), dtype=torch.float64, device=x.device)
            nearest = Ball(norm, x.flatten(1), radius, lower, upper)[torch.from_numpy(outside)].nearest(
                there[outside].flatten(1)
            )
            nearest = nearest.reshape(x[outside].shape)
            found = check_again(subject, x[outside], target[outside], nearest, norm=norm, by=EARLIER, epsilon=epsilon)
            tries.take(level, rows[outside], found, np.arange(len(outside)))
    tries.take(len(grid), rows, as_they_are, np.arange(len(rows)))


class _NearestErrors:
    """The nearest errors of the samples of a batch."""

    def __init__(self, count: int, kept: Kept, known: NDArray) -> None:
        self.kept = kept
        self.found = {
            "distance": known.astype(np.float64),
            "by": np.full(count, "", NAME),
            "prediction": np.full(count, -1),
            "errors": np.zeros(count, np.int64),
        }

    def wants(self, rows: NDArray, epsilon: float) -> NDArray:
        """Say which rows stand at a radius."""
        return self.found["distance"][rows] > epsilon

    def take(self, level: int, rows: NDArray, found: CheckedResult, chosen: NDArray) -> None:
        """Take in those chosen of the points found that are nearer, of several for a row the nearest."""
        nearer = chosen[found.distance[chosen] < self.found["distance"][rows[chosen]]]
        nearer = nearer[np.argsort(-found.distance[nearer], kind="stable")]
        for name, values in self.found.items():
            values[rows[nearer]] = getattr(found, name)[nearer]
        self.kept.take(rows, found, nearer)


class _Errors:
    """The largest errors of the samples of a batch at each radius."""

    def __init__(self, count: int, kept: Kept, levels: int, *, keep_all: bool) -> None:
        self.kept, self._all = kept, keep_all
        self.found = {"error": np.zeros((levels, count)), "by": np.full((levels, count), EARLIER, NAME)}

    def wants(self, rows: NDArray, epsilon: float) -> NDArray:
        """Say that every row is of interest at every radius."""
        return np.ones(len(rows), dtype=bool)

    def take(self, level: int, rows: NDArray, found: CheckedResult, chosen: NDArray) -> None:
        """Take in those chosen of the points found that are worse, of several for a row the worst."""
        levels = len(self.found["error"])
        if level == levels:
            return
        error = self.found["error"][level]
        worse = chosen[found.error[chosen] > error[rows[chosen]]]
        worse = worse[np.argsort(found.error[worse], kind="stable")]
        error[rows[worse]] = found.error[worse]
        if self._all or level == levels // 2:
            self.kept.take(rows, found, worse, level=level)
