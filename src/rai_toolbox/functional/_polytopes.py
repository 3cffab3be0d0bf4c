"""Euclidean projections on boxes and on the simplex; see `_projections.py` for what all projections have in common."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import blocks, datum_ndim
from rai_toolbox.functional._nearest import Bound, Number, clip, nearest_on_simplex
from rai_toolbox.functional._per_datum import (
    checked_float,
    map_rows,
    map_rows_,
    map_rows_of_all_,
    per_datum,
    per_entry,
)
from rai_toolbox.kernels._large_projection import put_large_on_simplex_
from rai_toolbox.kernels._machine import seen
from rai_toolbox.kernels._scratch import WORK_NUMEL, is_large, is_shared_out, scratch


@documented
def project_box(x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """Clamp every entry to [lower, upper].

    Returns
    -------
    Tensor
        The shape and dtype of `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_box
    >>> project_box(torch.tensor([-1.0, 0.5, 2.0]), lower=0.0, upper=torch.tensor([1.0, 1.0, 1.5]))
    tensor([0.0000, 0.5000, 1.5000])
    """
    return map_rows(clip, checked_float("x", x), 0, (), checked_bounds(x, lower, upper))


@twin_of(project_box)
def project_box_(x: Tensor, lower: Bound, upper: Bound) -> Tensor:
    """The in-place form of `project_box`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_box_
    >>> project_box_(torch.tensor([-1.0, 0.5, 2.0]), lower=0.0, upper=None)
    tensor([0.0000, 0.5000, 2.0000])
    """
    clip_ = functools.partial(clip, in_place=True)
    return map_rows_(clip_, checked_float("x", x), 0, (), checked_bounds(x, lower, upper))


@documented
def project_simplex(x: Tensor, total: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """Project each datum on the simplex {z : z ≥ 0, Σz = total}: argmin ‖z - x‖₂.

    Parameters
    ----------
    total : float or Tensor
        ≥ 0: a number, or one entry per datum.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. Can be differentiated.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_simplex
    >>> project_simplex(torch.tensor([[0.75, 0.5, -1.0]]))
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    return _on_simplex(x, total, param_ndim)


@twin_of(project_simplex)
def project_simplex_(x: Tensor, total: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """The in-place form of `project_simplex`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_simplex_
    >>> project_simplex_(torch.tensor([[0.75, 0.5, -1.0]]), total=0.25)
    tensor([[0.2500, 0.0000, 0.0000]])
    """
    return _on_simplex(x, total, param_ndim, in_place=True)


def _on_simplex(x: Tensor, total: Number, param_ndim: int | None, *, in_place: bool = False) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    column_ = per_datum("total", total, x, k)
    if in_place and _by_kernels.put_on_simplex_(x, k, column_):
        return x
    if not in_place and _by_kernels.has_kernels(x) and not _by_kernels.is_differentiated(x, column_):
        z = x.clone(memory_format=torch.contiguous_format)
        if _by_kernels.put_on_simplex_(z, k, column_):
            return z

    rows_function = _moved_onto_simplex if in_place else nearest_on_simplex
    return map_rows(rows_function, x, param_ndim, (column_,), in_place=in_place, any_order=True)


def project_simplex_of_all_(xs: Sequence[Tensor], ks: Sequence[int], total: Number) -> None:
    """`project_simplex_` of every tensor of a list, whose last k dimensions are a datum, for one total."""
    if not all(is_shared_out(checked_float("x", x)) for x in xs):
        for x, k in zip(xs, ks, strict=True):
            project_simplex_(x, total, param_ndim=k)
        return
    map_rows_of_all_(lambda rows: _moved_onto_simplex(rows, total), xs, ks, any_order=True)


def _moved_onto_simplex(rows: Tensor, total: Number) -> Tensor:
    """The nearest points of the simplex, perhaps in the memory of the rows."""
    if is_large(rows) and put_large_on_simplex_(rows, total):
        return rows
    return nearest_on_simplex(rows, total, in_place=True)


def checked_bounds(x: Tensor, lower: Bound, upper: Bound) -> tuple[Bound, Bound]:
    low, high = per_entry("lower", lower, x), per_entry("upper", upper, x)
    if low is None or high is None or x.numel() == 0:
        return low, high
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        with torch.no_grad():
            crossed = seen(lambda: _cross(x, low, high), x)
    else:
        crossed = low > high
    if crossed:
        raise ValueError(f"`lower` must not exceed `upper`, got lower={lower!r} and upper={upper!r}")
    return low, high


def _cross(x: Tensor, low: Bound, high: Bound) -> bool:
    """Whether low > high somewhere, one of which is a tensor; block by block."""
    lows, highs = (blocks(v, 0, WORK_NUMEL) if isinstance(v, Tensor) else itertools.repeat(v) for v in (low, high))
    for part, least, most in zip(blocks(x, 0, WORK_NUMEL), lows, highs, strict=False):
        alike = isinstance(least, Tensor) and isinstance(most, Tensor) and least.dtype == most.dtype == x.dtype
        gap = torch.sub(most, least, out=scratch(part, 0)) if alike else most - least  # pyright: ignore
        if bool(gap.amin() < 0):  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            return True
    return False
