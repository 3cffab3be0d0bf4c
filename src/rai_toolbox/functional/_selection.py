"""Top-q: keep the entries of largest magnitude of each datum. A selection, never a sort."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import datum_ndim, is_number
from rai_toolbox.functional._per_datum import checked_float, map_rows, map_rows_, map_rows_of_all_
from rai_toolbox.kernels._large_selection import keep_largest_, signs_of_largest_
from rai_toolbox.kernels._scratch import is_large
from rai_toolbox.kernels._selection import is_searched, kept, search


def kept_count(numel: int, q: float) -> int:
    """How many of `numel` entries top-q keeps: `round((1 - q) * numel)`.

    Raises TypeError, ValueError: `q` is not a number, or not in [0, 1].
    """
    if not is_number(q):
        raise TypeError(f"`q` must be a number, got {q!r}")
    if not 0 <= q <= 1:
        raise ValueError(f"`q` must lie in [0, 1], got {q!r}")
    return round((1 - float(q)) * numel)


@documented
def top_q(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Keep the entries of largest magnitude of each datum and set the others to zero.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. The gradient passes through the kept entries.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import top_q
    >>> top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    count = count_of(x, q, param_ndim)
    return map_rows(lambda rows: _keep(rows, count), x, param_ndim)


@twin_of(top_q)
def top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """The in-place form of `top_q`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import top_q_
    >>> top_q_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.75)
    tensor([[ 0., -3.,  0.,  0.]])
    """
    count = count_of(x, q, param_ndim)
    if _by_kernels.keep_largest_([x], [datum_ndim(x.ndim, param_ndim)], [count]):
        return x
    return map_rows_(lambda rows: _keep_(rows, count), x, param_ndim)


@documented
def signed_top_q(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """Top-q, then the sign, then division by the L1 norm: ±scale/k on the k kept entries that are not zero.

    The division is by the number of entries that are kept *and* not zero, so that the L1 norm of the result is `scale`
    unless the datum is zero.

    Parameters
    ----------
    scale : float
        The L1 norm of the result.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. A kept NaN stays NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import signed_top_q
    >>> signed_top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    count = count_of(x, q, param_ndim)
    return map_rows(lambda rows: _signed(rows, count, scale), x.detach(), param_ndim)


@twin_of(signed_top_q)
def signed_top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """The in-place form of `signed_top_q`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import signed_top_q_
    >>> signed_top_q_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5, scale=-1.0)
    tensor([[-0.0000,  0.5000, -0.5000, -0.0000]])
    """
    count = count_of(x, q, param_ndim)
    if _by_kernels.signs_of_largest_([x], [datum_ndim(x.ndim, param_ndim)], [count], scale):
        return x
    return map_rows_(lambda rows: signed_rows_(rows, count, scale), x, param_ndim)


def top_q_of_all_(xs: Sequence[Tensor], ks: Sequence[int], q: float) -> None:
    """`top_q_` of every tensor of a list, whose last k dimensions are a datum."""
    counts = [kept_count(_by_kernels.length_of(x, k), q) for x, k in zip(xs, ks, strict=True)]
    if _by_kernels.keep_largest_(xs, ks, counts):
        return
    map_rows_of_all_(lambda rows: _keep_(rows, kept_count(rows.shape[1], q)), xs, ks)


def signed_top_q_of_all_(xs: Sequence[Tensor], ks: Sequence[int], q: float) -> None:
    """`signed_top_q_` of every tensor of a list, whose last k dimensions are a datum."""
    counts = [kept_count(_by_kernels.length_of(x, k), q) for x, k in zip(xs, ks, strict=True)]
    if _by_kernels.signs_of_largest_(xs, ks, counts, 1.0):
        return
    map_rows_of_all_(lambda rows: signed_rows_(rows, kept_count(rows.shape[1], q), 1.0), xs, ks)


def count_of(x: Tensor, q: float, param_ndim: int | None) -> int:
    """How many entries of a datum of `x` top-q keeps."""
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return kept_count(math.prod(x.shape[x.ndim - k :]), q)


def signed_rows(rows: Tensor, count: int) -> Tensor:
    """`signed_top_q` of a matrix with one datum a row, in float32 or float64."""
    if is_searched(rows, count):
        return signed_rows_(rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True), count, 1.0)
    return _signed(rows, count, 1.0)


def signed_rows_(rows: Tensor, count: int, scale: float) -> Tensor:
    """`signed_top_q_` of a matrix with one datum a row."""
    if count == 0:
        return rows.zero_()
    if is_large(rows) and count < rows.shape[1]:
        return signs_of_largest_(rows, count, scale)
    if not is_searched(rows, count):
        return rows.copy_(_signed(rows, count, scale))
    keep, left = search(rows, count)
    exact = _signed(rows.index_select(0, left), count, scale) if left.numel() else None
    torch.addcmul(_zero(keep.dtype), rows.sign_(), keep, value=scale / count, out=rows)
    return rows if exact is None else rows.index_copy_(0, left, exact.to(rows.dtype))


def _keep(rows: Tensor, count: int) -> Tensor:
    if not is_searched(rows, count):
        return _masked(rows, kept(rows.detach(), count))
    keep, left = search(rows.detach(), count)
    if not left.numel():
        return rows * keep.to(rows.dtype, copy=True) + 0.0
    return _masked(rows, keep.bool().index_copy_(0, left, kept(rows.detach().index_select(0, left), count)))


def _keep_(rows: Tensor, count: int) -> Tensor:
    if count == 0:
        return rows.zero_()
    if is_large(rows) and 0 < count < rows.shape[1]:
        return keep_largest_(rows, count)
    if not is_searched(rows, count):
        return rows.copy_(_masked(rows, kept(rows, count)))
    keep, left = search(rows, count)
    exact = _masked(part := rows.index_select(0, left), kept(part, count)) if left.numel() else None
    torch.addcmul(_zero(rows.dtype), rows, keep.to(rows.dtype), out=rows)
    return rows if exact is None else rows.index_copy_(0, left, exact)


@functools.lru_cache(maxsize=8)
def _zero(dtype: torch.dtype) -> Tensor:
    """What is added for the sign of a zero: -0 + 0 is 0."""
    with torch.inference_mode(False):  # it is kept
        return torch.zeros((), dtype=dtype, device="cpu")


def _masked(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, rows, rows.new_zeros(()))


def _signed(rows: Tensor, count: int, scale: float) -> Tensor:
    mask = kept(rows, count)
    work = torch.promote_types(rows.dtype, torch.float32)
    sign = _masked(torch.where(rows.isnan(), rows, rows.sign()).to(work), mask)
    return sign * (scale / (mask & (rows != 0)).sum(1, keepdim=True).clamp_min(1).to(work))
