"""Nearest points of a ball, of a ball and a box, and of the simplex, row by row, as a CPU finds them.

Where looking at a value is not free, there is nothing here. With y the entries turned to be ≥ 0 where the box lets
them, and [l, h] their allowed magnitudes, the nearest point of ball ∩ box is clip(y - θ, l, h) for L1 and
clip(t y, l, h) for L2, turned back: the conditions of Karush, Kuhn and Tucker, entry by entry. A radius that the box
alone satisfies leaves θ = 0, t = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.kernels._factors import slack
from rai_toolbox.kernels._few_left import with_few_left
from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._multipliers import level_for_sum, nearest_with_sum, scale_for_square_sum, shift_for_sum
from rai_toolbox.kernels._norms import direct_norms_of_rows, scaled_norms
from rai_toolbox.kernels._portable import Bound, Number, clip, column, l2_scaled, on_simplex, with_sum
from rai_toolbox.kernels._portable import folded as folded_anywhere
from rai_toolbox.kernels._scratch import scratch

# Between these radii, single precision holds every square and sum that matters.
_SINGLE_RANGE = 1e-12, 1e12


def nearest_in_ball(rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int, in_place: bool) -> Tensor | None:
    """The nearest point of {‖z‖_p ≤ epsilon} ∩ [low, high] to each row, p 1 or 2; without a gradient.

    With `in_place` it may be in the memory of the rows.
    """
    if not can_branch_on_values(rows):
        return None
    if rows.shape[1] == 1 and low is None and high is None and not isinstance(epsilon, Tensor):
        return clip(rows, -epsilon, epsilon)
    least, most = (float(v) for v in epsilon.aminmax()) if isinstance(epsilon, Tensor) else (epsilon, epsilon)
    sane = _SINGLE_RANGE[0] <= least and most <= _SINGLE_RANGE[1]
    if p == 1 and sane and low is None and high is None and rows.dtype != torch.float64:
        moved = _clearly_outside(rows, column(epsilon, rows, torch.float32), in_place)
        if moved is not None:
            return moved
    clipped = clip(rows, low, high)
    eps = column(epsilon, rows, torch.float64)
    norm = (direct_norms_of_rows(clipped, p) if sane else scaled_norms(clipped, p)).unsqueeze(1)
    relative, absolute = slack(rows.dtype, rows.shape[1], p)
    outside = (norm > eps * (1 + relative) + absolute).nonzero()[:, 0]
    count = outside.numel()
    if count == 0:
        return clipped
    every = count == rows.shape[0]

    def part(v: Bound) -> Bound:
        return v.index_select(0, outside) if isinstance(v, Tensor) and not every and v.shape[0] > 1 else v

    x, eps, norm = (v if every else v.index_select(0, outside) for v in (rows, eps, norm))
    with torch.no_grad():
        moved = _moved(x, eps, part(low), part(high), norm, p, sane)
    if every:
        return moved
    result = clipped.clone() if clipped is rows else clipped
    return result.index_copy_(0, outside, moved.to(result.dtype))


def nearest_on_simplex(rows: Tensor, total: Number, in_place: bool) -> Tensor | None:
    """The nearest point of {z ≥ 0, Σz = total} to each row; without a gradient.

    With `in_place` it may be in the memory of the rows.
    """
    if not can_branch_on_values(rows):
        return None
    if rows.dtype != torch.float64:
        moved = _clearly_off_simplex(rows, column(total, rows, torch.float32), in_place)
        if moved is not None:
            return moved
    x, s = rows.double(), column(total, rows, torch.float64)
    inside = on_simplex(x, s, rows.dtype)
    return rows if bool(inside.all()) else torch.where(inside, x, with_sum(x, s, level_for_sum))


def _moved(x: Tensor, eps: Tensor, low: Bound, high: Bound, norm: Tensor, p: int, sane: bool) -> Tensor:
    """The nearest points to rows that are all outside."""
    single = sane and x.dtype != torch.float64 and bool((norm < 1e15).all())
    if low is None and high is None:
        if p == 2:
            factor = eps / norm
            if not bool((norm < torch.inf).all()) or bool((factor < 1e-290).any()):
                return l2_scaled(x.double(), eps)
            return x * factor.float() if single and float(factor.amin()) > 1e-30 else x.double() * factor
        if not single:
            x = x.double()
            return with_sum(x.abs(), eps, level_for_sum).copysign(x)
        found = with_few_left(x, eps.float(), signed=True, in_place=False)
        return _soft_thresholded(x, _magnitudes(x), eps.float(), norm.float()) if found is None else found
    if single:
        z, error = _boxed(x.float(), eps.float(), low, high, norm.float(), p)
        if float(error.amax()) <= 1e-6:
            return z
        rows = (~(error[:, 0] <= 1e-6)).nonzero()[:, 0]
        low, high = (v.index_select(0, rows) if isinstance(v, Tensor) else v for v in (low, high))
        rest, norm = x.index_select(0, rows), norm.index_select(0, rows)
        redone, _ = _boxed(rest.double(), eps.index_select(0, rows), low, high, norm, p)
        return z.index_copy_(0, rows, redone.float())
    return _boxed(x.double(), eps, low, high, norm, p)[0]


def _clearly_outside(rows: Tensor, radius: Tensor, in_place: bool) -> Tensor | None:
    """The nearest points of an L1 ball where no row is near it and none too large for float32, else None."""
    found = with_few_left(rows, radius, signed=True, in_place=in_place)
    if found is not None:
        return found
    a = _magnitudes(rows)
    sums = a.sum(1, keepdim=True)
    near = 1.001 + 8 * torch.finfo(rows.dtype).eps
    if bool(((sums > radius * near) & (sums < 1e15)).all()):
        return (
            rows.sign_().mul_(nearest_with_sum(a, radius, sums))
            if in_place
            else _soft_thresholded(rows, a, radius, sums)
        )
    return None


def _clearly_off_simplex(rows: Tensor, total: Tensor, in_place: bool) -> Tensor | None:
    """The nearest points of a simplex where each row has negative entries and is in the range of float32, else None."""
    low, high = _SINGLE_RANGE
    if bool(((total > low) & (total < high)).all()):
        found = with_few_left(rows, total, signed=False, in_place=in_place)
        if found is not None:
            return found
    x = scratch(rows, 0, torch.float32).copy_(rows)
    top, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    if not bool(((least < 0) & (top.abs() < high) & (total > low) & (total < high)).all()):
        return None
    sums = torch.clamp_min(x, 0, out=scratch(x, 1)).sum(1, keepdim=True)
    return nearest_with_sum(x, total, 2 * sums)


def _magnitudes(x: Tensor) -> Tensor:
    a = scratch(x, 0, torch.float32)
    return torch.abs(x, out=a) if x.dtype == a.dtype else a.copy_(x).abs_()


def _soft_thresholded(x: Tensor, a: Tensor, total: Tensor, sums: Tensor) -> Tensor:
    """sign(x) max(a - θ, 0) with the L1 norm `total`, in float32 and in scratch memory, for `a` = |x|."""
    z = nearest_with_sum(a, total, sums)
    return z.mul_(torch.sign(x, out=a) if x.dtype == a.dtype else a.copy_(x).sign_())


def _boxed(x: Tensor, eps: Tensor, low: Bound, high: Bound, norm: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The nearest points to rows whose clipped norm, `norm`, is more than eps; and the error of their norms."""
    sign, l, h = _folded(x, low, high)
    cap = eps if l is None else torch.maximum(eps, l)
    y, h = torch.mul(x, sign, out=scratch(x, 5)), torch.minimum(h, cap, out=scratch(x, 4))
    y, unbounded = _without_infinities(y, l, h, eps, p)
    if p == 1:
        found = shift_for_sum(lambda: ((y, l, h),), torch.zeros_like(eps), y.amax(1, keepdim=True).clamp_min(0), eps)
        inner = found.of(y)
    else:
        top = torch.where(unbounded, eps, torch.ones_like(eps))
        # y in units of its largest entry, the results in units of the radius: no square leaves the range
        unit = torch.where(eps > 0, eps, torch.ones_like(eps))
        largest = y.amax(1, keepdim=True)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        base = y.div_(largest)
        part = base, None if l is None else l / unit, torch.div(h, unit, out=scratch(x, 6))
        ratio = largest / unit
        found = scale_for_square_sum(lambda: (part,), (eps / norm).minimum(top) * ratio, top * ratio)
        inner = found.of(base) * unit
    z = torch.minimum(inner.clamp_min(0) if l is None else torch.maximum(inner, l), h)
    if p == 1:
        z = _with_sum_at_most(z, eps, l, h)
    return z.mul_(sign), found.error


def _with_sum_at_most(z: Tensor, total: Tensor, least: Tensor | None, most: Tensor) -> Tensor:
    """`z`, its free entries smaller by some ulp, where roundings have added up to more than the slack."""
    found = z.sum(1, keepdim=True)
    over = found > total * (1 + 2 * torch.finfo(z.dtype).eps)
    if not bool(over.any()):
        return z
    floor = torch.where(z < most, torch.zeros_like(z) if least is None else least, z)
    room = (z - floor).sum(1, keepdim=True)
    share = (1 - (found - total) / torch.where(room > 0, room, torch.ones_like(room))).clamp_min(0)
    return torch.where(over & (room > 0), torch.maximum(floor + (z - floor) * share, floor), z)


def _folded(x: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `_portable.folded`; l None is 0. The signs and h may lie in scratch memory."""
    lo = torch.as_tensor(-torch.inf if low is None else low, dtype=x.dtype)
    hi = torch.as_tensor(torch.inf if high is None else high, dtype=x.dtype)
    if not float(lo.amax()) <= 0 <= float(hi.amin()):
        return folded_anywhere(x, low, high)
    sign = torch.ge(x, 0, out=scratch(x, 3)).mul_(2).sub_(1)
    h, other = scratch(x, 4), scratch(x, 5)
    return sign, None, torch.maximum(torch.mul(sign, lo, out=h), torch.mul(sign, hi, out=other), out=h)


def _without_infinities(y: Tensor, l: Tensor | None, h: Tensor, eps: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Finite entries with the same nearest point, and which rows are in units of their infinite entries.

    An infinite entry takes its bound h, unless the infinite ones at their bounds (and the others at their least) leave
    the ball: then only these are shared, as if they had grown at the same pace.
    """
    largest = y.amax(1, keepdim=True)
    if bool((largest < torch.inf).all()):
        return y, torch.zeros_like(largest, dtype=torch.bool)
    infinite = y == torch.inf
    least = torch.zeros_like(y) if l is None else l
    bound = torch.where(infinite, h, least)
    unbounded = infinite.any(1, keepdim=True) & ((bound**p).sum(1, keepdim=True) > eps**p)
    finite = torch.where(infinite, torch.finfo(y.dtype).max / 4, y).clamp_min(-torch.finfo(y.dtype).max / 4)
    unit = eps if p == 1 else torch.ones_like(eps)
    return torch.where(unbounded, infinite.to(y.dtype) * unit, finite), unbounded
