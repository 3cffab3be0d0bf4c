"""Choose the radii to report (the grid) where the user gave none, and radii to try between those."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness.attack._settings import Box, Norm
from rai_toolbox.robustness.data._samples import Summary

# The farthest hundredth of the samples may be outliers that would stretch the axis for all.
_REACH = 0.99
# How far below its nearest known error a sample is tried again, as a share of the samples that lie between; and what
# share of them a round must break for the other half to be tried.
_SHARE, _FEW = 0.01, 0.02


def grid_for_distances(norm: Norm, distance: NDArray, widest: float, count: int = 8) -> tuple[float, ...]:
    """Return round radii, evenly spaced, up to where (nearly) no sample stands.

    norm: whose distances they are: radii in L0 are whole numbers.
    distance: the nearest error of each sample; those at 0 do not count.
    widest: no radius is larger, if it is finite: the reach where most samples have no error at all.
    count: how many, about.
    """
    right = distance[distance > 0]
    near = np.sort(right[np.isfinite(right)])
    if len(near) == 0:
        return _even(widest if math.isfinite(widest) else 1.0, count, whole=norm == "l0")
    reach = near[min(len(near) - 1, math.ceil(_REACH * len(near)))]
    return _even(float(reach), count, whole=norm == "l0")


def grid_for_spread(norm: Norm, summary: Summary, box: Box, count: int = 8) -> tuple[float, ...]:
    """Return round radii up to a fifth of how far samples spread in this norm: for a task that has no decisions."""
    spread = summary.spread if box.movable is None else summary.spread[box.movable]
    reach = {"linf": np.max, "l2": np.linalg.norm, "l1": np.sum}[norm](spread.reshape(-1))
    return _even(float(reach) / 5 or 1.0, count)


def widest_radius(norm: Norm, summary: Summary, box: Box, shape: tuple[int, ...]) -> float:
    """Return a radius within which a sample can become any other: the diameter of the box, or of the data."""
    low = summary.minimum if box.lower is None else box.lower
    high = summary.maximum if box.upper is None else box.upper
    side = np.broadcast_to(np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64), shape)
    side = np.where(np.isfinite(side), side, summary.maximum - summary.minimum)
    side = side if box.movable is None else side[box.movable]
    if norm == "l0":
        return float(side.size)
    return float(np.linalg.norm(side.reshape(-1), {"linf": np.inf, "l2": 2, "l1": 1}[norm])) or 1.0


class Rounds:
    """Which samples the fixed-budget solver tries again, between the radii of the grid, and where: in rounds.

    Each is tried where a hundredth of the samples is broken between there and its nearest known error: what lies nearer
    still can lower the curve by no more than that at any radius. Where it is broken, the next round tries it twice as
    far below; where it stands, half as far, down to a hundredth. Every second sample begins, in the order of their
    distances; the others follow if some of these are broken.
    """

    def __init__(self, grid: Sequence[float], distance: NDArray) -> None:
        steps = np.array([0.0, *grid])
        # The largest radius at which each stands, and by how many hundredths below its distance it is tried.
        self._stands = steps[np.searchsorted(steps, distance) - 1]
        self._below = np.where((distance > 0) & (distance <= steps[-1]), 1, 0)
        self._others = np.zeros(len(distance), dtype=bool)
        self._others[np.argsort(distance, kind="stable")[::2]] = True

    def radii(self, distance: NDArray) -> NDArray:
        """Return where to try each sample, NaN for nowhere.

        distance: where each is known to be broken.
        """
        ordered = np.append(np.sort(distance), 0.0)
        place, hundredth = np.searchsorted(ordered[:-1], distance), max(1, round(_SHARE * len(distance)))
        while True:
            radius = ordered[np.maximum(place - self._below * hundredth, -1)]
            near = (self._below > 0) & (radius <= self._stands)
            if not near.any():
                return np.where((self._below > 0) & ~self._others, radius, np.nan)
            self._below[near] //= 2

    def learn(self, radius: NDArray, broken: NDArray) -> None:
        """Take in which samples a round has broken at these radii."""
        stood = (radius > self._stands) & ~broken
        self._stands[stood] = radius[stood]
        self._below[stood] //= 2
        self._below[broken] *= 2
        if broken.sum() > _FEW * len(broken):
            self._others[:] = False


def _even(reach: float, count: int, *, whole: bool = False) -> tuple[float, ...]:
    power = 10.0 ** math.floor(math.log10(reach / count))
    power = max(1.0, power) if whole else power
    steps = [factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0)]
    step = next(
        step for step in steps if step * count >= reach * (1 - 1e-9) and (not whole or step == math.floor(step))
    )
    points = math.ceil(reach / step - 1e-9)
    return tuple(float(f"{step * k:.6g}") for k in range(1, points + 1))
