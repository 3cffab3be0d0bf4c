"""Euclidean projections on balls, boxes, their intersections and the simplex, per datum."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._multipliers import factor_for_square_sum, level_for_sum, shift_for_sum
from rai_toolbox.functional._per_datum import (
    checked_float,
    map_rows,
    map_rows_,
    may_look,
    per_datum,
    per_entry,
)

Number = float | Tensor
Bound = float | Tensor | None


def project_l1_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the L1 ball, or on the ball's intersection with a box.

    TODO"""
    return _ball(map_rows, _l1_rows, x, epsilon, param_ndim, lower, upper)


def project_l1_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l1_ball`."""
    return _ball(map_rows_, _l1_rows, x, epsilon, param_ndim, lower, upper)


def project_l2_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the L2 ball, or on the ball's intersection with a box."""
    return _ball(map_rows, _l2_rows, x, epsilon, param_ndim, lower, upper)


def project_l2_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l2_ball`."""
    return _ball(map_rows_, _l2_rows, x, epsilon, param_ndim, lower, upper)


def project_linf_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the Linf ball, or on the ball's intersection with a box."""
    return _ball(map_rows, _linf_rows, x, epsilon, param_ndim, lower, upper)


def project_linf_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_linf_ball`."""
    return _ball(map_rows_, _linf_rows, x, epsilon, param_ndim, lower, upper)


def project_l0_ball(
    x: Tensor, k: int, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the set with at most `k` entries that are not zero, or on its intersection with a box."""
    return _l0(map_rows, x, k, param_ndim, lower, upper)


def project_l0_ball_(
    x: Tensor, k: int, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l0_ball`."""
    return _l0(map_rows_, x, k, param_ndim, lower, upper)


def project_box(x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """Clamp every entry to [lower, upper]."""
    return map_rows(_box_rows, checked_float("x", x), 0, (), _bounds(x, lower, upper))


def project_box_(x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """The in-place form of `project_box`."""
    return map_rows_(_box_rows, checked_float("x", x), 0, (), _bounds(x, lower, upper))


def project_simplex(x: Tensor, total: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """Project each datum on the simplex {z : z ≥ 0, Σz = total}."""
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return map_rows(_simplex_rows, x, param_ndim, (per_datum("total", total, x, k),))


def project_simplex_(x: Tensor, total: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """The in-place form of `project_simplex`."""
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return map_rows_(_simplex_rows, x, param_ndim, (per_datum("total", total, x, k),), any_order=True)


def _ball(
    mapper: Callable,
    rows_function: Callable,
    x: Tensor,
    epsilon: Number,
    param_ndim: int | None,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    column = per_datum("epsilon", epsilon, x, k)
    return mapper(rows_function, x, param_ndim, (column,), _bounds(x, lower, upper))


def _bounds(x: Tensor, lower: Bound, upper: Bound) -> tuple[Bound, Bound]:
    low, high = per_entry("lower", lower, x), per_entry("upper", upper, x)
    if low is not None and high is not None:
        both = isinstance(low, Tensor) or isinstance(high, Tensor)
        if not both:
            crossed = low > high  # pyright: ignore
        elif may_look(x):
            crossed = bool((torch.as_tensor(low) > torch.as_tensor(high)).any())
        else:
            crossed = False
        if crossed:
            raise ValueError(f"`lower` must not exceed `upper`, got lower={lower!r} and upper={upper!r}")
    return low, high


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _column(value: Number, rows: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(rows.dtype)
    return torch.full((rows.shape[0], 1), value, dtype=rows.dtype, device=rows.device)


def _clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low = None if low is None else torch.as_tensor(low, dtype=x.dtype, device=x.device)
        high = None if high is None else torch.as_tensor(high, dtype=x.dtype, device=x.device)
    if low is None and high is None:
        return x
    return x.clamp(low, high)  # pyright: ignore


def _slack(dtype: torch.dtype) -> float:
    """How far above the radius a norm may be for a point that is in the ball but for rounding."""
    return 4 * torch.finfo(dtype).eps


def _l1_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    x = rows.to(_work_dtype(rows))
    eps = _column(epsilon, x)
    if low is None and high is None:
        a = x.abs()
        inside = a.sum(1, keepdim=True) <= eps * (1 + _slack(rows.dtype))
        return torch.where(inside, x, _to_sum(a, eps).copysign(x))
    y, lo, hi, sign = _folded(x, low, high, eps)
    inside = y.clamp(lo, hi).sum(1, keepdim=True) <= eps * (1 + _slack(rows.dtype))
    with torch.no_grad():
        huge = y == torch.inf
        lost = (torch.where(huge, hi, lo)).sum(1, keepdim=True) > eps
        y = torch.where(
            lost, torch.where(huge, eps, torch.zeros_like(y)), y.clamp_max(torch.finfo(y.dtype).max)
        )
    theta = shift_for_sum(y, lo, hi, eps)
    return torch.where(inside, _clip(x, low, high), sign * (y - theta).clamp(lo, hi))


def _l2_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    x = rows.to(_work_dtype(rows))
    eps = _column(epsilon, x)
    y, lo, hi, sign = _folded(x, low, high, eps)
    inside = y.clamp(lo, hi).square().sum(1, keepdim=True) <= (eps * (1 + _slack(rows.dtype))).square()
    huge = y == torch.inf
    lost = torch.where(huge, hi, lo).square().sum(1, keepdim=True) > eps.square()
    y = torch.where(lost & huge.any(1, keepdim=True), huge.to(y.dtype), y.clamp_max(1e150))
    top = torch.where(lost & huge.any(1, keepdim=True), eps, torch.ones_like(eps))
    t = factor_for_square_sum(y, lo, hi, eps, top)
    return torch.where(inside, _clip(x, low, high), sign * (y * t).clamp(lo, hi))


def _linf_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    x = rows
    lo = _clip(-_column(epsilon, x) if isinstance(epsilon, Tensor) else torch.tensor(-epsilon), low, None)
    hi = _clip(_column(epsilon, x) if isinstance(epsilon, Tensor) else torch.tensor(epsilon), None, high)
    return x.clamp(lo.to(x), hi.to(x))


def _box_rows(rows: Tensor, low: Bound, high: Bound) -> Tensor:
    return _clip(rows, low, high)


def _simplex_rows(rows: Tensor, total: Number) -> Tensor:
    x = rows.to(_work_dtype(rows))
    s = _column(total, x)
    inside = ((x.sum(1, keepdim=True) - s).abs() <= s * _slack(rows.dtype)) & (x >= 0).all(1, keepdim=True)
    return torch.where(inside, x, _to_sum(x, s))


def _to_sum(y: Tensor, total: Tensor) -> Tensor:
    """The nearest point with entries ≥ 0 that sum to `total`."""
    top = y.amax(1, keepdim=True)
    shared = torch.where(y == torch.inf, y.new_zeros(()), y.new_full((), torch.inf))
    depth = torch.where(top == torch.inf, shared, top - y)
    with torch.no_grad():
        level = level_for_sum(depth, total)
    active = depth < level
    count = active.sum(1, keepdim=True)
    exact = (total + torch.where(active, depth, depth.new_zeros(())).sum(1, keepdim=True)) / count.clamp_min(
        1
    )
    return torch.where(active, (exact - depth).clamp_min(0), depth.new_zeros(()))


def _folded(x: Tensor, low: Bound, high: Bound, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn each entry so that its allowed magnitudes are an interval 0 ≤ lo ≤ |z| ≤ hi: (y, lo, hi, sign), x = sign·y."""
    l = torch.full_like(x, -torch.inf) if low is None else torch.as_tensor(low, dtype=x.dtype).expand_as(x)
    h = torch.full_like(x, torch.inf) if high is None else torch.as_tensor(high, dtype=x.dtype).expand_as(x)
    sign = torch.where(
        (l > 0) | (h >= 0) & (x >= 0) & (l >= 0) | (l < 0) & (h > 0) & (x >= 0) | (h > 0) & (l == 0),
        1.0,
        -1.0,
    ).to(x.dtype)
    lo = torch.where(l > 0, l, torch.where(h < 0, -h, torch.zeros_like(x)))
    hi = torch.where(sign > 0, h, -l).clamp_min(0).minimum(eps).maximum(lo)
    return x * sign, lo, hi, sign


def _l0(mapper, x: Tensor, k: int, param_ndim: int | None, lower: Bound, upper: Bound) -> Tensor:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"`k` must be an int, got {k!r}")
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k!r}")
    datum_ndim(checked_float("x", x).ndim, param_ndim)
    return mapper(
        lambda rows, low, high: _l0_rows(rows, k, low, high), x, param_ndim, (), _bounds(x, lower, upper)
    )


def _l0_rows(rows: Tensor, k: int, low: Bound, high: Bound) -> Tensor:
    from rai_toolbox.functional._selection import _kept

    z = _clip(rows, low, high)
    if k >= rows.shape[1]:
        return z
    gain = rows.double().square() - (rows.double() - z.double()).square()
    # an entry that zero is not allowed for must be kept
    forced = (z != 0) & (_clip(torch.zeros_like(rows), low, high) != 0)
    gain = torch.where(forced, gain.new_full((), torch.inf), gain)
    return torch.where(_kept(gain, k), z, z.new_zeros(()))
