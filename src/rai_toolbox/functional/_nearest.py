"""The nearest point of a ball, a box or both, for matrices with one datum a row, with its gradient."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._by_kernels import is_differentiated
from rai_toolbox.functional._closed_form import closed_form
from rai_toolbox.kernels import _nearest, _portable
from rai_toolbox.kernels._factors import slack
from rai_toolbox.kernels._machine import seen, wide_dtype
from rai_toolbox.kernels._multipliers import level_for_sum
from rai_toolbox.kernels._norms import plain_norm
from rai_toolbox.kernels._portable import column, folded, l2_scaled, on_simplex, with_sum
from rai_toolbox.kernels._selection import kept

Number: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None

# A power of two that brings the largest numbers of float64 where they can be added up.
_DOWN = 2.0**-64


def clip(x: Tensor, low: Bound, high: Bound, *, in_place: bool = False) -> Tensor:
    """`x` itself without bounds; NaN stays NaN."""
    if low is None and high is None:
        return x
    if is_differentiated(x) and low is not None and high is not None and not in_place:
        # torch passes the gradient of an entry that is at a bound: right, unless it cannot leave it
        pinned = torch.as_tensor(low, dtype=x.dtype, device=x.device) == torch.as_tensor(
            high, dtype=x.dtype, device=x.device
        )
        x = torch.where(pinned, x.detach(), x)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low = None if low is None else torch.as_tensor(low, dtype=x.dtype, device=x.device)
        high = None if high is None else torch.as_tensor(high, dtype=x.dtype, device=x.device)
    else:
        low, high = representable(low, x.dtype), representable(high, x.dtype)
    if is_differentiated(x, low, high) and not in_place:
        # at a bound the gradient is that of x; clamp of torch from 2.14 on shares or drops it
        inside = (torch.ones_like(x, dtype=torch.bool) if low is None else x >= low) & (
            True if high is None else x <= high
        )
        return torch.where(inside, x, x.clamp(low, high))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return (x.clamp_ if in_place else x.clamp)(low, high)  # pyright: ignore[reportCallIssue, reportArgumentType]


def representable(bound: float | None, dtype: torch.dtype) -> float | None:
    """The nearest finite number of `dtype`; torch refuses to convert a number outside its range."""
    if bound is None or not math.isfinite(bound):
        return bound
    largest = torch.finfo(dtype).max
    return min(max(bound, -largest), largest)


def nearest_in_ball(
    rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int, *, in_place: bool = False
) -> Tensor:
    """The nearest point of {‖z‖_p ≤ epsilon} ∩ [low, high] to each row, p 1 or 2; with `in_place` perhaps there."""
    if rows.dtype == torch.float64 and _near_the_end(epsilon):
        down = [v * _DOWN if v is not None else None for v in (epsilon, low, high)]
        smaller = rows * _DOWN
        z = nearest_in_ball(smaller, down[0], down[1], down[2], p)  # pyright: ignore[reportArgumentType]
        # what is the smaller for it may have lost digits
        return clip(torch.where(z == smaller, rows, z / _DOWN), low, high)
    found = None
    if not is_differentiated(rows, epsilon, low, high):
        found = _nearest.nearest_in_ball(rows, epsilon, low, high, p, in_place)
    return _nearest_anywhere(rows, epsilon, low, high, p) if found is None else found


def nearest_on_simplex(rows: Tensor, total: Number, *, in_place: bool = False) -> Tensor:
    """The nearest point of {z ≥ 0, Σz = total} to each row; with `in_place` perhaps there."""
    if rows.dtype == torch.float64 and _near_the_end(total):
        smaller = rows * _DOWN
        z = nearest_on_simplex(smaller, total * _DOWN)
        return torch.where(z == smaller, rows, z / _DOWN)
    found = None if is_differentiated(rows, total) else _nearest.nearest_on_simplex(rows, total, in_place)
    if found is not None:
        return found
    work = wide_dtype(rows)
    x, s = rows.to(work), column(total, rows, work)
    inside = on_simplex(x, s, rows.dtype)
    # a point of the simplex is its own nearest one, but does not follow every change of x
    z = with_sum(x, s, level_for_sum)
    stays = inside & z.isfinite()
    return torch.where(stays, x.detach() + (z - z.detach()), torch.where(inside, x, z))


def _nearest_anywhere(rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int) -> Tensor:
    """`nearest_in_ball` in a fixed number of operations, and with a gradient."""
    work = wide_dtype(rows)
    x = rows.to(work)
    eps = column(epsilon, rows, work)
    clipped = clip(x, low, high)
    with torch.no_grad():
        largest = clipped.abs().amax(1, keepdim=True)
        unit = torch.where((largest > 0) & (largest < torch.inf), largest, torch.ones_like(largest))
        norm = plain_norm(clipped / unit, p, 1) * unit
        relative, absolute = slack(rows.dtype, rows.shape[1], p)
        outside = norm > eps * (1 + relative) + absolute
    # rows that stay take a harmless stand-in, so that no gradient passes through 0/0 or ∞ - ∞
    eps = torch.where(outside, eps, torch.ones_like(eps))
    if low is None and high is None:
        if p == 1:
            # not copysign: its gradient at zero is zero
            z = with_sum(x.abs(), eps, level_for_sum) * torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
        else:
            z = l2_scaled(torch.where(outside, x, torch.ones_like(x)), eps)
        return torch.where(outside, z, clipped)
    with torch.no_grad():
        nearest = _portable.boxed(x.detach(), eps.detach(), _detached(low), _detached(high), p)
    sign, least, h = folded(x, low, high)
    z = closed_form(x * sign, least, h, eps, nearest * sign, _has_inside(x, low, high), p) * sign
    # the value that was solved for (exact over the whole range), the gradient of the closed form
    z = nearest + (z - z.detach()) if z.requires_grad else nearest
    return torch.where(outside, z, clipped)


def _has_inside(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """Where zero lies between the bounds and at neither."""
    return (torch.zeros_like(x) > (-torch.inf if low is None else low)) & (
        torch.zeros_like(x) < (torch.inf if high is None else high)
    )


def _detached(bound: Bound) -> Bound:
    return bound.detach() if isinstance(bound, Tensor) else bound


def _near_the_end(epsilon: Number) -> bool:
    """Whether sums as large as the radius could leave the range of float64."""
    if not isinstance(epsilon, Tensor):
        return 1e300 < epsilon < torch.inf
    return bool(seen(lambda: bool(((epsilon > 1e300) & (epsilon < torch.inf)).any()), epsilon))


def nearest_sparse(rows: Tensor, k: int, low: Bound, high: Bound) -> Tensor:
    """The nearest point of the box with at most k entries that are not zero to each row."""
    z = clip(rows, low, high)
    if k >= rows.shape[1]:
        return z
    with torch.no_grad():
        # Keeping an entry at z instead of zero takes x² - (x - z)² = z (2x - z) from the squared distance, which is
        # not negative as z lies between 0 and x. Its root is formed from the roots: squares could leave the range.
        x, inner = rows.to(wide_dtype(rows)), z.to(wide_dtype(rows))
        gain = inner.abs().sqrt() * (2 * x - inner).abs().sqrt()
        gain = torch.where(x.abs() == torch.inf, torch.where(inner.isinf(), torch.inf, gain), gain)
        forced = clip(torch.zeros_like(rows), low, high) != 0  # zero is not in the box
        keep = kept(torch.where(forced, torch.full_like(gain, torch.inf), gain), k)
    return torch.where(keep, z, torch.zeros_like(z))
