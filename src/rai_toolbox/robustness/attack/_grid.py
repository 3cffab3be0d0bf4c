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
# How many evenly spaced radii samples are tried at.
_BETWEEN = 100


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


def radii_between(norm: Norm, grid: Sequence[float]) -> tuple[float, ...]:
    """Return the radii of a grid and a hundred evenly spaced ones up to the largest; one radius stays alone."""
    if len(grid) == 1:
        return tuple(grid)
    even = np.linspace(0, grid[-1], _BETWEEN + 1)[1:]
    even = even[~np.isclose(even[:, None], grid, rtol=1e-9, atol=0).any(axis=1)]
    radii = np.sort(np.append(even, grid))
    return tuple((np.unique(np.floor(radii[radii >= 1])) if norm == "l0" else radii).tolist())


def _even(reach: float, count: int, *, whole: bool = False) -> tuple[float, ...]:
    power = 10.0 ** math.floor(math.log10(reach / count))
    power = max(1.0, power) if whole else power
    steps = [factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0)]
    step = next(
        step for step in steps if step * count >= reach * (1 - 1e-9) and (not whole or step == math.floor(step))
    )
    points = math.ceil(reach / step - 1e-9)
    return tuple(float(f"{step * k:.6g}") for k in range(1, points + 1))
