"""Euclidean projections on balls, boxes, their intersections and the simplex, per datum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._nearest import Bound, Number, clip, column, nearest_in_ball, nearest_on_simplex
from rai_toolbox.functional._selection import kept
from rai_toolbox.functional._per_datum import (
    checked_float,
    map_rows,
    map_rows_,
    may_look,
    per_datum,
    per_entry,
)


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
    return map_rows(nearest_on_simplex, x, param_ndim, (per_datum("total", total, x, k),))


def project_simplex_(x: Tensor, total: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """The in-place form of `project_simplex`."""
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return map_rows_(nearest_on_simplex, x, param_ndim, (per_datum("total", total, x, k),), any_order=True)


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


def _l1_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    return nearest_in_ball(rows, epsilon, low, high, 1)


def _l2_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    return nearest_in_ball(rows, epsilon, low, high, 2)


def _linf_rows(rows: Tensor, epsilon: Number, low: Bound, high: Bound) -> Tensor:
    x = rows
    lo = clip(-column(epsilon, x, x.dtype) if isinstance(epsilon, Tensor) else torch.tensor(-epsilon), low, None)
    hi = clip(column(epsilon, x, x.dtype) if isinstance(epsilon, Tensor) else torch.tensor(epsilon), None, high)
    return x.clamp(lo.to(x), hi.to(x))


def _box_rows(rows: Tensor, low: Bound, high: Bound) -> Tensor:
    return clip(rows, low, high)


def _l0(mapper, x: Tensor, k: int, param_ndim: int | None, lower: Bound, upper: Bound) -> Tensor:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"`k` must be an int, got {k!r}")
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k!r}")
    datum_ndim(checked_float("x", x).ndim, param_ndim)
    return mapper(lambda rows, low, high: _l0_rows(rows, k, low, high), x, param_ndim, (), _bounds(x, lower, upper))


def _l0_rows(rows: Tensor, k: int, low: Bound, high: Bound) -> Tensor:
    z = clip(rows, low, high)
    if k >= rows.shape[1]:
        return z
    gain = rows.double().square() - (rows.double() - z.double()).square()
    # an entry that zero is not allowed for must be kept
    forced = (z != 0) & (clip(torch.zeros_like(rows), low, high) != 0)
    gain = torch.where(forced, gain.new_full((), torch.inf), gain)
    return torch.where(kept(gain, k), z, z.new_zeros(()))
