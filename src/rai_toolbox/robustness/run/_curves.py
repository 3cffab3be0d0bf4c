"""From the outcomes of the samples to curves."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._results import ClassRow, Curve, Point
from rai_toolbox.robustness._statistics import mean_interval, wilson_interval

__all__ = ["accuracy_curve", "error_curve"]


def accuracy_curve(
    norm: str,
    grid: tuple[float, ...],
    distance: NDArray,
    searched: NDArray,
    labels: NDArray,
    class_names: tuple[str, ...],
    *,
    forwards: float,
    confirmed: bool,
    by_solvers: NDArray | None = None,
) -> Curve:
    """Return the curve that the samples' distances make.

    Parameters
    ----------
    distance : NDArray
        The nearest error found by any solver.
    searched : NDArray
        The nearest that the minimum-norm solver found.
    by_solvers : NDArray, optional
        The nearest that both solvers found, where stronger attacks have been run.
    """
    count = len(distance)
    points = []
    for epsilon in (0.0, *grid):
        standing = int((distance > epsilon).sum())
        by_search = int((searched > epsilon).sum())
        by_both = standing if by_solvers is None else int((by_solvers > epsilon).sum())
        low, high = wilson_interval(standing, count)
        points.append(
            Point(
                epsilon,
                standing / max(1, count),
                low,
                high,
                count,
                by_search / max(1, count),
                by_search - by_both,
                by_both - standing,
            )
        )
    right = distance[distance > 0]
    median = float(np.median(right)) if len(right) else math.inf
    rows = []
    for label in np.unique(labels).tolist():
        mine = distance[labels == label]
        values = tuple(float((mine > epsilon).mean()) for epsilon in (0.0, *grid))
        name = class_names[label] if label < len(class_names) else str(label)
        rows.append(ClassRow(label, name, len(mine), values))
    return Curve(
        norm,
        tuple(points),
        median if math.isfinite(median) else None,
        tuple(rows),
        forwards / max(1, count),
        confirmed,
    )


def error_curve(norm: str, grid: tuple[float, ...], error: NDArray, forwards: float, confirmed: bool) -> Curve:
    """Return the curve of mean absolute errors; `error` has a row for epsilon 0 and one for each of the grid."""
    points = []
    for epsilon, values in zip((0.0, *grid), error, strict=True):
        low, high = mean_interval(float(values.sum()), float(np.square(values).sum()), len(values))
        points.append(Point(epsilon, float(values.mean()), max(0.0, low), high, len(values)))
    return Curve(norm, tuple(points), None, (), forwards / max(1, error.shape[1]), confirmed)
