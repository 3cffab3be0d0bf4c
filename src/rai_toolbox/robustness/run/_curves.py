"""From the outcomes of the samples to curves."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._evidence import AveragePoint, Corruption, CorruptionPoint
from rai_toolbox.robustness._results import ClassRow, Curve, Point
from rai_toolbox.robustness._statistics import clopper_pearson_interval, mean_interval, wilson_interval


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
    by_earlier: NDArray | None = None,
    by_solvers: NDArray | None = None,
) -> Curve:
    """Return the curve that the samples' distances make.

    distance: the nearest error found by any solver.
    searched: the nearest that the minimum-norm solver found.
    by_earlier: the nearest of these and the points of earlier evaluations, if there are any.
    by_solvers: the nearest that both solvers found, where stronger attacks have been run.
    """
    count = len(distance)
    points = []
    for epsilon in (0.0, *grid):
        standing = int((distance > epsilon).sum())
        by_search = int((searched > epsilon).sum())
        before = by_search if by_earlier is None else int((by_earlier > epsilon).sum())
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
                before - by_both,
                by_both - standing,
                by_search - before,
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
        points.append(Point(epsilon, *_mean(values), len(values)))
    return Curve(norm, tuple(points), None, (), forwards / max(1, error.shape[1]), confirmed)


def average_of(
    grid: tuple[float, ...], unperturbed: NDArray, error: NDArray, clamped: NDArray, draws: int, *, counts: bool
) -> tuple[AveragePoint, ...]:
    """Return the average beside a curve.

    unperturbed, shape (samples,): whether each sample is wrong from the start, or its error.
    error, shape (radii, samples): the mean over the random points of each sample.
    clamped, shape (radii,): how many points were clamped to the bounds.
    draws: points per sample and radius.
    counts: whether the errors are misclassifications, which are counted.
    """
    points = []
    for level, (epsilon, values) in enumerate(zip((0.0, *grid), (unperturbed, *error), strict=True)):
        times = draws if level > 0 else 1
        value, low, high = _rate(values, times) if counts else _mean(values)
        of_those = 0 if level == 0 else int(clamped[level - 1])
        points.append(AveragePoint(epsilon, value, low, high, len(values) * times, of_those))
    return tuple(points)


def corruption_of(
    name: str, severities: tuple[float, ...], unperturbed: NDArray, error: NDArray, *, classifies: bool
) -> Corruption:
    """Return a corruption's curve; `error` has a row for each severity, of 0 and 1 in a classification."""
    points = []
    for severity, values in zip((0, *severities), (unperturbed, *error), strict=True):
        value, low, high = _rate(1.0 - values) if classifies else _mean(values)
        points.append(CorruptionPoint(severity, value, low, high, len(values)))
    return Corruption(name, tuple(points))


def _rate(values: NDArray, times: int = 1) -> tuple[float, float, float]:
    """Return a share and its exact interval, from the shares of samples with so many trials each."""
    trials = len(values) * times
    count = round(float(values.sum()) * times)
    return count / max(1, trials), *clopper_pearson_interval(count, trials)


def _mean(values: NDArray) -> tuple[float, float, float]:
    low, high = mean_interval(float(values.sum()), float(np.square(values).sum()), len(values))
    return float(values.mean()), max(0.0, low), high
