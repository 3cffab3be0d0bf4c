"""The nearest point of a ball, a box or both, for matrices with one datum a row.

With y the entries turned to be ≥ 0 where the box lets them, and [l, h] their allowed magnitudes, the nearest point of
ball ∩ box is clip(y - θ, l, h) for L1 and clip(t y, l, h) for L2, turned back: the conditions of Karush, Kuhn and
Tucker, entry by entry. A radius that the box alone satisfies leaves θ = 0, t = 1.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._closed_form import closed_form
from rai_toolbox.functional._multipliers import (
    level_for_sum,
    poured,
    scale_for_square_sum,
    shift_for_sum,
)
from rai_toolbox.functional._norms import (
    direct_norms,
    is_summed,
    plain_norm,
    scaled_norms,
    scratch_dtype,
    summed_norms,
)
from rai_toolbox.functional._per_datum import may_look, scratch
from rai_toolbox.functional._selection import kept
from rai_toolbox.kernels import _portable
from rai_toolbox.kernels._factors import slack

Number: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None

# Between these radii, single precision holds every square and sum that matters.
_SINGLE_RANGE = 1e-12, 1e12

# A power of two that brings the largest numbers of float64 where they can be added up.
_DOWN = 2.0**-64


def clip(x: Tensor, low: Bound, high: Bound, *, in_place: bool = False) -> Tensor:
    """`x` itself without bounds; NaN stays NaN."""
    if low is None and high is None:
        return x
    if _needs_grad(x) and low is not None and high is not None and not in_place:
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
    if _needs_grad(x, low, high) and not in_place:
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


def nearest_in_ball(rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int) -> Tensor:
    """The nearest point of {‖z‖_p ≤ epsilon} ∩ [low, high] to each row, p 1 or 2."""
    if rows.dtype == torch.float64 and _near_the_end(epsilon):
        down = [v * _DOWN if v is not None else None for v in (epsilon, low, high)]
        smaller = rows * _DOWN
        z = nearest_in_ball(smaller, down[0], down[1], down[2], p)  # pyright: ignore[reportArgumentType]
        # what is the smaller for it may have lost digits
        return clip(torch.where(z == smaller, rows, z / _DOWN), low, high)
    if not may_look(rows) or _needs_grad(rows, epsilon, low, high):
        return _nearest_anywhere(rows, epsilon, low, high, p)
    clipped = clip(rows, low, high)
    eps = column(epsilon, rows, torch.float64)
    least, most = (float(v) for v in eps.aminmax()) if eps.numel() > 1 else (float(eps), float(eps))
    sane = _SINGLE_RANGE[0] <= least and most <= _SINGLE_RANGE[1]
    if p == 1 and sane and low is None and high is None and rows.dtype != torch.float64:
        moved = _clearly_outside(rows, eps)
        if moved is not None:
            return moved
    norm = (_norms(clipped, p) if sane else scaled_norms(clipped, 1, p)).unsqueeze(1)
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


def nearest_on_simplex(rows: Tensor, total: Number) -> Tensor:
    """The nearest point of {z ≥ 0, Σz = total} to each row."""
    if rows.dtype == torch.float64 and _near_the_end(total):
        smaller = rows * _DOWN
        z = nearest_on_simplex(smaller, total * _DOWN)
        return torch.where(z == smaller, rows, z / _DOWN)
    if rows.dtype != torch.float64 and may_look(rows) and not _needs_grad(rows, total):
        moved = _clearly_off_simplex(rows, column(total, rows, torch.float32))
        if moved is not None:
            return moved
    work = _wide(rows)
    x = rows.to(work)
    s = column(total, rows, work)
    relative, absolute = slack(rows.dtype, rows.shape[1], 1)
    least = x.amin(1, keepdim=True)
    inside = ((x.sum(1, keepdim=True) - s).abs() <= s * relative + absolute) & (least >= 0)
    inside = inside | least.isnan()  # as the balls: there is no nearest point
    if may_look(x) and not _needs_grad(rows, total):
        return rows if bool(inside.all()) else torch.where(inside, x, _with_sum(x, s))
    # a point of the simplex is its own nearest one, but does not follow every change of x
    z = _with_sum(x, s)
    stays = inside & z.isfinite()
    return torch.where(stays, x.detach() + (z - z.detach()), torch.where(inside, x, z))


def _norms(rows: Tensor, p: int) -> Tensor:
    if is_summed(rows.dtype, p):  # in memory that is there
        return summed_norms(rows, p, scratch(rows, 0, scratch_dtype(rows.dtype, p)).view(-1))
    return direct_norms(rows, 1, p)


def column(value: Number, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A setting per datum as a column of `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((rows.shape[0], 1), value, dtype=dtype, device=rows.device)


def _moved(x: Tensor, eps: Tensor, low: Bound, high: Bound, norm: Tensor, p: int, sane: bool) -> Tensor:
    """The nearest points to rows that are all outside."""
    single = sane and x.dtype != torch.float64 and bool((norm < 1e15).all())
    if low is None and high is None:
        if p == 2:
            factor = eps / norm
            if not bool((norm < torch.inf).all()) or bool((factor < 1e-290).any()):
                return _l2_scaled(x.double(), eps)
            return x * factor.float() if single and float(factor.amin()) > 1e-30 else x.double() * factor
        if not single:
            x = x.double()
            return _with_sum(x.abs(), eps).copysign(x)
        return _soft_thresholded(x, _magnitudes(x), eps.float(), norm.float())
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


def _clearly_outside(rows: Tensor, eps: Tensor) -> Tensor | None:
    """The nearest points of an L1 ball where no row is near it and none too large for float32, else None."""
    a, radius = _magnitudes(rows), eps.float()
    sums = a.sum(1, keepdim=True)
    near = 1.001 + 8 * torch.finfo(rows.dtype).eps
    if bool(((sums > radius * near) & (sums < 1e15)).all()):
        return _soft_thresholded(rows, a, radius, sums)
    return None


def _clearly_off_simplex(rows: Tensor, total: Tensor) -> Tensor | None:
    """The nearest points of a simplex where each row has negative entries and is in the range of float32, else None."""
    x = scratch(rows, 0, torch.float32).copy_(rows)
    top, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    low, high = _SINGLE_RANGE
    if not bool(((least < 0) & (top.abs() < high) & (total > low) & (total < high)).all()):
        return None
    sums = torch.clamp_min(x, 0, out=scratch(x, 1)).sum(1, keepdim=True)
    return poured(torch.sub(top, x, out=x), total, top, 2 * sums)


def _magnitudes(x: Tensor) -> Tensor:
    a = scratch(x, 0, torch.float32)
    return torch.abs(x, out=a) if x.dtype == a.dtype else a.copy_(x).abs_()


def _soft_thresholded(x: Tensor, a: Tensor, total: Tensor, sums: Tensor) -> Tensor:
    """sign(x) max(a - θ, 0) with the L1 norm `total`, in float32 and in scratch memory, for `a` = |x|."""
    top = a.amax(1, keepdim=True)
    z = poured(torch.sub(top, a, out=a), total, top, sums)
    return z.mul_(torch.sign(x, out=a) if x.dtype == a.dtype else a.copy_(x).sign_())


def _boxed(x: Tensor, eps: Tensor, low: Bound, high: Bound, norm: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """The nearest points to rows whose clipped norm, `norm`, is more than eps; and the error of their norms."""
    sign, l, h = folded(x, low, high)
    cap = eps if l is None else torch.maximum(eps, l)
    if may_look(x):
        y, h = torch.mul(x, sign, out=scratch(x, 5)), torch.minimum(h, cap, out=scratch(x, 4))
    else:
        y, h = x * sign, torch.minimum(h, cap)
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
        base = y.div_(largest) if may_look(x) else y / largest
        part = base, None if l is None else l / unit, torch.div(h, unit, out=scratch(x, 6)) if may_look(x) else h / unit
        ratio = largest / unit
        found = scale_for_square_sum(lambda: (part,), (eps / norm).minimum(top) * ratio, top * ratio)
        inner = found.of(base) * unit
    z = torch.minimum(inner.clamp_min(0) if l is None else torch.maximum(inner, l), h)
    if p == 1:
        z = _with_sum_at_most(z, eps, l, h)
    return z.mul_(sign) if may_look(x) else z * sign, found.error


def _with_sum_at_most(z: Tensor, total: Tensor, least: Tensor | None, most: Tensor) -> Tensor:
    """`z`, its free entries smaller by some ulp, where roundings have added up to more than the slack."""
    found = z.sum(1, keepdim=True)
    over = found > total * (1 + 2 * torch.finfo(z.dtype).eps)
    if may_look(z) and not bool(over.any()):
        return z
    floor = torch.where(z < most, torch.zeros_like(z) if least is None else least, z)
    room = (z - floor).sum(1, keepdim=True)
    share = (1 - (found - total) / torch.where(room > 0, room, torch.ones_like(room))).clamp_min(0)
    return torch.where(over & (room > 0), torch.maximum(floor + (z - floor) * share, floor), z)


def folded(x: Tensor, low: Bound, high: Bound, *, lasting: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Signs that turn entries, and the interval [l, h], 0 ≤ l, that their turned values may lie in; l None is 0.

    Not `lasting`, they may lie in scratch memory, and cannot be differentiated.
    """
    lo = torch.as_tensor(-torch.inf if low is None else low, dtype=x.dtype, device=x.device)
    hi = torch.as_tensor(torch.inf if high is None else high, dtype=x.dtype, device=x.device)
    if may_look(x) and not lasting:
        sign = torch.ge(x, 0, out=scratch(x, 3)).mul_(2).sub_(1)
        around_zero = float(lo.detach().amax()) <= 0 <= float(hi.detach().amin())
    else:
        sign = torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x))
        around_zero = False
    if around_zero:
        h, other = scratch(x, 4), scratch(x, 5)
        return sign, None, torch.maximum(torch.mul(sign, lo, out=h), torch.mul(sign, hi, out=other), out=h)
    # an entry whose interval leaves zero out keeps that side's sign, whatever x is
    nearest_zero = torch.minimum(torch.maximum(torch.zeros_like(x), lo), hi)
    sign = torch.where(nearest_zero != 0, nearest_zero.sign(), sign)
    return sign, nearest_zero.abs(), _not_negative(torch.maximum(sign * lo, sign * hi))


def _without_infinities(y: Tensor, l: Tensor | None, h: Tensor, eps: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Finite entries with the same nearest point, and which rows are in units of their infinite entries.

    An infinite entry takes its bound h, unless the infinite ones at their bounds (and the others at their least) leave
    the ball: then only these are shared, as if they had grown at the same pace.
    """
    largest = y.amax(1, keepdim=True)
    if may_look(y) and bool((largest < torch.inf).all()):
        return y, torch.zeros_like(largest, dtype=torch.bool)
    infinite = y == torch.inf
    least = torch.zeros_like(y) if l is None else l
    bound = torch.where(infinite, h, least)
    unbounded = infinite.any(1, keepdim=True) & ((bound**p).sum(1, keepdim=True) > eps**p)
    finite = torch.where(infinite, torch.finfo(y.dtype).max / 4, y).clamp_min(-torch.finfo(y.dtype).max / 4)
    unit = eps if p == 1 else torch.ones_like(eps)
    return torch.where(unbounded, infinite.to(y.dtype) * unit, finite), unbounded


def _l2_scaled(x: Tensor, eps: Tensor) -> Tensor:
    """x eps/‖x‖ ≤ x, in double precision, where entries may be infinite or have squares that are."""
    infinite = x.isinf()
    x = torch.where(infinite.any(1, keepdim=True), torch.where(infinite, x.sign(), torch.zeros_like(x)), x)
    largest = x.detach().abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    share = eps / plain_norm(x / largest, 2, 1)
    # The factor share/largest in two steps: it may be less than the least number, and an entry over the largest too.
    with torch.no_grad():
        exponent = ((share.log2() - largest.log2()) / 2).round()
        step = torch.where(share > 0, exponent.exp2(), torch.ones_like(share))
    return x * step * (share / (largest * step))


def _with_sum(y: Tensor, total: Tensor) -> Tensor:
    """The nearest point with entries ≥ 0 that sum to `total`; can be differentiated."""
    top = y.amax(1, keepdim=True)
    zero, infinity = y.new_zeros(()), y.new_full((), torch.inf)
    shared = torch.where(y == infinity, zero, infinity)
    depth = torch.where(top == infinity, shared, top - y)
    with torch.no_grad():
        active = (depth < level_for_sum(depth.detach(), total.detach())) | (depth == 0)
    count = active.sum(1, keepdim=True).clamp_min(1)
    level = (total + torch.where(active, depth, zero).sum(1, keepdim=True)) / count
    z = torch.where(active, _not_negative(level - depth), zero)
    return z * _correction(z.detach(), total.detach())


def _correction(z: Tensor, total: Tensor) -> Tensor:
    """A factor within rounding of 1 that brings the sum to the total: the level has digits only of its own size."""
    found = z.sum(1, keepdim=True)
    return torch.where(found > 0, total / found, torch.ones_like(found))


def _nearest_anywhere(rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int) -> Tensor:
    """`nearest_in_ball` in a fixed number of operations, and with a gradient."""
    work = _wide(rows)
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
            z = _with_sum(x.abs(), eps) * torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
        else:
            z = _l2_scaled(torch.where(outside, x, torch.ones_like(x)), eps)
        return torch.where(outside, z, clipped)
    with torch.no_grad():
        nearest = _portable.boxed(x.detach(), eps.detach(), _detached(low), _detached(high), p)
    sign, l, h = folded(x, low, high, lasting=True)
    least = torch.zeros_like(h) if l is None else l
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
    if isinstance(epsilon, Tensor):
        return may_look(epsilon) and bool(((epsilon > 1e300) & (epsilon < torch.inf)).any())
    return 1e300 < epsilon < torch.inf


def _not_negative(x: Tensor) -> Tensor:
    """max(x, 0), with a gradient of 1 at zero, where that of `clamp_min` depends on the version of torch."""
    return torch.where(x < 0, torch.zeros_like(x), x)


def _needs_grad(*values: Number | Bound) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.device.type == "mps" else torch.float64


def nearest_sparse(rows: Tensor, k: int, low: Bound, high: Bound) -> Tensor:
    """The nearest point of the box with at most k entries that are not zero to each row."""
    z = clip(rows, low, high)
    if k >= rows.shape[1]:
        return z
    with torch.no_grad():
        # Keeping an entry at z instead of zero takes x² - (x - z)² = z (2x - z) from the squared distance, which is
        # not negative as z lies between 0 and x. Its root is formed from the roots: squares could leave the range.
        x, inner = rows.to(_wide(rows)), z.to(_wide(rows))
        gain = inner.abs().sqrt() * (2 * x - inner).abs().sqrt()
        gain = torch.where(x.abs() == torch.inf, torch.where(inner.isinf(), torch.inf, gain), gain)
        forced = clip(torch.zeros_like(rows), low, high) != 0  # zero is not in the box
        keep = kept(torch.where(forced, torch.full_like(gain, torch.inf), gain), k)
    return torch.where(keep, z, torch.zeros_like(z))
