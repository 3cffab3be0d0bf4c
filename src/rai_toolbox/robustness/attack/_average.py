"""Random points of the ball and the box around each sample.

What they find is evidence of another kind than what an attack finds: a rate, with an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rai_toolbox.perturbations._ball import Ball, unit_l2
from rai_toolbox.perturbations._noise import Noise, draw_seed
from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness.attack._kept import Kept
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import (
    NAME,
    CheckedResult,
    as_numpy,
    check_again,
    decisions,
    distances,
    mean_absolute_error,
)
from rai_toolbox.robustness.attack._subject import Subject

#: The name of this way to find errors.
RANDOM_POINT = "random point"

# A point of the ball is drawn again, at most so often, while it lies outside of the box. With more entries than
# `_FEW` a draw hardly ever lies inside where bounds are near, and the first is clamped.
_TRIES = 64
_FEW = 64


def can_be_drawn(subject: Subject, norm: Norm) -> bool:
    """Say whether ball and box have random points: in L0 a feature that changes may take any value without bounds."""
    if norm != "l0":
        return True
    movable = np.ones(subject.samples.shape, bool) if subject.box.movable is None else subject.box.movable
    bounds = [np.broadcast_to(np.nan if end is None else end, movable.shape)[movable] for end in subject.box.ends]
    return all(bool(np.isfinite(bound).all()) for bound in bounds)


def average(subject: Subject, norm: Norm, batch: int, grid: Sequence[float], known: NDArray) -> dict[str, Any]:
    """Return the model's errors at random points around each sample of a batch, at each radius.

    known: of a classifier, the nearest error known of each sample of the batch, shape (samples,): what is not nearer
    is not kept.

    Returns ``error``, shape (radii, samples): the share of a sample's points that are misclassified, or the mean
    absolute error at them. ``largest``: the same for the worst of them. ``distance``, shape (samples,): of the nearest
    point that is misclassified and nearer than what is known, of a random model only where it is an error to the
    solvers too. ``clamped``, shape (radii,): how many points had to be clamped to the box.
    """
    start, stop = subject.span(batch)
    x, target = subject.batch(start, stop)
    draw = _Draws(subject, norm, x, start)
    count = subject.settings.average
    subject.begin(len(grid) * count * (stop - start))
    error, largest = np.zeros((2, len(grid), stop - start))
    clamped = np.zeros(len(grid), dtype=np.int64)
    distance, kept = np.full(stop - start, np.inf), Kept(subject, batch)
    errors = np.zeros(stop - start, np.int64)
    for level, epsilon in enumerate(grid):
        for point in range(count):
            perturbed, was_clamped = draw(epsilon, level * count + point)
            clamped[level] += was_clamped
            found, output = error_at(subject, perturbed, target)
            error[level] += found / count
            worse = found > (0 if subject.classifies else largest[level])
            largest[level] = np.maximum(largest[level], found)
            rows = np.flatnonzero(worse)
            if len(rows) and (subject.classifies or subject.settings.keep_points):
                judged = _judged(subject, norm, epsilon, *(part[rows] for part in (x, target, perturbed, output)))
                nearest = np.minimum(distance, known)[rows] if subject.classifies else np.inf
                nearer = judged.distance < nearest
                distance[rows[nearer]], errors[rows[nearer]] = judged.distance[nearer], judged.errors[nearer]
                kept.take(rows, judged, nearer, level=0 if subject.classifies else level)
    return {
        "error": error,
        "largest": largest,
        "distance": distance,
        "errors": errors,
        "clamped": clamped,
        **subject.spent,
        **kept.arrays(),
    }


def error_at(subject: Subject, x: Tensor, target: Tensor) -> tuple[NDArray, Tensor]:
    """Return 1 where the model is wrong and 0 where it is right, or its absolute error; and its outputs."""
    with torch.no_grad():
        output = subject.model(x)
    if not subject.classifies:
        return as_numpy(mean_absolute_error(output, target)), output
    # A NaN among the logits is no right decision.
    wrong = misclassified(output, target) | ~output.isfinite().all(dim=1)
    return as_numpy(wrong.double()), output


def _judged(
    subject: Subject, norm: Norm, epsilon: float, x: Tensor, target: Tensor, perturbed: Tensor, output: Tensor
) -> CheckedResult:
    """Return points at which the model erred as what is found; of a random model, asked again."""
    if subject.settings.draws > 1:
        return check_again(subject, x, target, perturbed, norm=norm, by=RANDOM_POINT, epsilon=epsilon)
    away = np.minimum(distances(perturbed, x, norm), epsilon)
    prediction = as_numpy(decisions(output) if subject.classifies else output)
    return CheckedResult(
        perturbed, away, prediction, away, 0, np.full(len(x), RANDOM_POINT, NAME), np.ones(len(x), np.int64)
    )


class _Draws:
    """Random points around the samples of a batch; those of a sample do not depend on the batch that it is in."""

    def __init__(self, subject: Subject, norm: Norm, x: Tensor, first: int) -> None:
        self._shape, self._norm = x.shape, norm
        self._x = x.flatten(1)
        bounds = subject.box.of(x)
        # Views of one row, where all have the same bounds.
        lower, upper = (None, None) if bounds is None else (b.expand_as(x).flatten(1) for b in bounds)
        self._ball = Ball(norm, self._x, self._x.new_zeros(len(x), 1, dtype=torch.float64), lower, upper)
        movable = subject.box.movable
        self._movable = None if movable is None else torch.from_numpy(movable.reshape(-1)).to(x.device)
        self._entries = self._x.shape[1] if movable is None else int(movable.sum())
        index = torch.arange(first, first + len(x), device=x.device)[:, None].expand(self._x.shape)
        # By the number of the sample and not by its content: equal samples get points of their own.
        self._noise = Noise(index.contiguous(), draw_seed(subject.generator("average", norm)))

    def __call__(self, epsilon: float, stream: int) -> tuple[Tensor, int]:
        """Return one point for each sample, and how many of them had to be clamped to the box."""
        rows = torch.arange(len(self._x), device=self._x.device)
        ball = self._ball.with_epsilon(torch.full_like(self._ball.epsilon, epsilon))
        low, high = (None if end is None else end.double() - self._x.double() for end in (ball.lower, ball.upper))
        if self._norm in ("linf", "l0"):
            delta = self._in_box(rows, stream * _TRIES, epsilon, low, high)
            return ball.land(delta).reshape(self._shape), 0
        delta = torch.zeros(self._x.shape, dtype=torch.float64, device=self._x.device)
        for attempt in range(_TRIES if self._entries <= _FEW else 1):
            delta[rows] = self._in_ball(rows, stream * _TRIES + attempt, epsilon)
            if low is None or high is None:
                return ball.land(delta).reshape(self._shape), 0
            outside = ((delta < low) | (delta > high)).any(dim=1)
            rows = outside.nonzero()[:, 0]
            if not len(rows):
                break
        return ball.land(delta).reshape(self._shape), len(rows)

    def _in_box(self, rows: Tensor, stream: int, epsilon: float, low: Tensor | None, high: Tensor | None) -> Tensor:
        """Return perturbations uniform on ball ∩ box: an interval for each entry, or for the entries that change."""
        uniform = self._noise.uniform(rows, 2 * stream)
        if self._norm == "l0":
            assert low is not None
            assert high is not None
            order = self._noise.uniform(rows, 2 * stream + 1)
            order = order if self._movable is None else torch.where(self._movable, order, 2.0)
            changing = order.argsort(dim=1).argsort(dim=1) < min(epsilon, self._entries)
            return torch.where(changing, low + (high - low) * uniform, 0.0)
        low = torch.full_like(uniform, -epsilon) if low is None else low.clamp(min=-epsilon)
        high = torch.full_like(uniform, epsilon) if high is None else high.clamp(max=epsilon)
        return low + (high - low) * uniform

    def _in_ball(self, rows: Tensor, stream: int, epsilon: float) -> Tensor:
        """Return perturbations uniform in the L2 or L1 ball of the entries that may change."""
        uniform = self._noise.uniform(rows, 2 * stream) + 2.0**-54  # never 0
        direction = torch.special.ndtri(uniform) if self._norm == "l2" else _laplace(uniform)
        if self._movable is not None:
            direction = torch.where(self._movable, direction, 0.0)
        size = self._noise.uniform(rows, 2 * stream + 1)[:, :1] ** (1 / self._entries) * epsilon
        if self._norm == "l2":
            return unit_l2(direction) * size
        return direction / direction.abs().sum(dim=1, keepdim=True) * size


def _laplace(uniform: Tensor) -> Tensor:
    """Return the Laplace variable with this distribution: its direction is uniform on the L1 sphere."""
    centered = uniform - 0.5
    return -centered.sign() * torch.log1p(-2 * centered.abs())
