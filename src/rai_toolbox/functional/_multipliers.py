"""The one unknown of a projection: the Lagrange multiplier of its norm constraint, per datum.

Every projection on a ball (with a box) is, entry by entry, a function of one number per datum, found where the norm of
the result is the radius. Matrices hold one datum per row; `radius` has shape (N, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.functional._per_datum import may_look

# Newton's method on these piecewise functions stops by itself, usually after 4 to 10 steps; a row that has not done so
# after this many goes on by bisection.
_NEWTON_STEPS = 30


def level_for_sum(depth: Tensor, total: Tensor) -> Tensor:
    """Solve Σ max(level - depth, 0) = total for the level: water poured into a vessel with a floor.

    Parameters
    ----------
    depth : Tensor, shape (N, D)
        ≥ 0, at least one 0 per row: the distance of each entry below the largest of its row. (Subtracting from the
        largest, and not a threshold from the entry, keeps every digit of a small total of large entries.)
    total : Tensor, shape (N, 1)
        ≥ 0.

    Returns
    -------
    Tensor, shape (N, 1)
        In [0, total].
    """
    if not may_look(depth):
        return _level_by_sort(depth, total)
    level = total
    count = torch.zeros_like(total)
    for _ in range(depth.shape[1] + 1):  # each step but the last drops an entry from some row
        active = depth < level
        count_now = active.sum(1, keepdim=True)
        if torch.equal(count_now, count):
            break
        count = count_now
        below = torch.where(active, depth, depth.new_zeros(())).sum(1, keepdim=True)
        level = torch.where(count > 0, (total + below) / count.clamp_min(1), level)
    return level


def _level_by_sort(depth: Tensor, total: Tensor) -> Tensor:
    """`level_for_sum` in a fixed number of operations."""
    floor = depth.minimum(total).sort(1).values
    n = torch.arange(1, depth.shape[1] + 1, dtype=depth.dtype, device=depth.device)
    levels = (total + floor.cumsum(1)) / n
    last = (floor < levels).sum(1, keepdim=True).clamp_min(1)
    return levels.gather(1, last - 1)


def shift_for_sum(y: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """Solve Σ clip(y - θ, low, high) = total for θ ≥ 0.

    Parameters
    ----------
    y : Tensor, shape (N, D)
        float64, finite.
    low, high : Tensor, shape (N, D)
        0 ≤ low ≤ high ≤ total, and Σ low ≤ total.
    total : Tensor, shape (N, 1)

    Returns
    -------
    Tensor, shape (N, 1)
        0 where the sum is at most `total` already.
    """

    def excess(theta: Tensor) -> tuple[Tensor, Tensor]:
        shifted = y - theta
        value = shifted.clamp(low, high)
        return value.sum(1, keepdim=True) - total, (value == shifted).sum(1, keepdim=True)

    bottom = torch.zeros_like(total)
    top = y.amax(1, keepdim=True).clamp_min(0)
    theta = bottom
    return _root(excess, theta, bottom, top, total)


def factor_for_square_sum(y: Tensor, low: Tensor, high: Tensor, radius: Tensor, top: Tensor) -> Tensor:
    """Solve Σ clip(t y, low, high)² = radius² for t in [0, top]; `top` where the sum is no more than that there."""

    def excess(t: Tensor) -> tuple[Tensor, Tensor]:
        scaled = y * t
        value = scaled.clamp(low, high)
        free = torch.where(value == scaled, y, y.new_zeros(())).square().sum(1, keepdim=True)
        return value.square().sum(1, keepdim=True) - radius.square(), free

    t = top
    lower, upper = torch.zeros_like(top), top
    for _ in range(100):
        e, free = excess(t)
        lower = torch.where(e <= 0, t, lower)
        upper = torch.where(e > 0, t, upper)
        # with the clipped entries held where they are: free t'² = free t² - e
        step = (t.square() - e / free).clamp_min(0).sqrt()
        step = torch.where((step > lower) & (step < upper), step, (lower + upper) / 2)
        done = (e.abs() <= 1e-15 * radius.square()) | (e <= 0) & (t >= top) | (upper - lower <= 1e-16 * upper)
        t = torch.where(done, t, step)
        if may_look(y) and bool(done.all()):
            break
    return t


def _root(excess, theta: Tensor, bottom: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Find where a decreasing piecewise linear function with slope -free crosses zero."""
    for _ in range(100):
        e, free = excess(theta)
        bottom = torch.where(e >= 0, theta, bottom)
        top = torch.where(e < 0, theta, top)
        step = theta + e / free
        step = torch.where((step > bottom) & (step < top), step, (bottom + top) / 2)
        done = (e.abs() <= 1e-15 * total) | (e <= 0) & (theta <= 0) | (top - bottom <= 1e-16 * top)
        theta = torch.where(done, theta, step)
        if may_look(theta) and bool(done.all()):
            break
    return theta
