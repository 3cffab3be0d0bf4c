"""Top-q: keep the entries of largest magnitude of each datum. A selection, never a sort.

On a CPU a selection by comparing and swapping (`topk`, `kthvalue`, `numpy.partition`) runs at 3 to 6 ns an entry, where
a pass of arithmetic takes 0.05. So the threshold is *searched*: count the entries above a guess, correct the guess by
the density of the entries there, and after three passes most rows of thousands are right or a few entries off; the
few are picked by their distance from the guess. A count of what is kept confirms each row, and the rare row that is
not confirmed (ties, NaN) is selected exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._large_selection import keep_largest_, signs_of_largest_
from rai_toolbox.functional._layout import datum_ndim, is_number
from rai_toolbox.functional._per_datum import (
    checked_float,
    is_large,
    map_rows,
    map_rows_,
    map_rows_of_all_,
    may_look,
    scratch,
)
from rai_toolbox.kernels import _portable

# How many entries a threshold may be off to be corrected by picking, and how many passes are made at most before.
_PICKED = 12
_PASSES = 8


def kept_count(numel: int, q: float) -> int:
    """How many of `numel` entries top-q keeps: `round((1 - q) * numel)`.

    Raises
    ------
    TypeError, ValueError
        `q` is not a number, or not in [0, 1].
    """
    if not is_number(q):
        raise TypeError(f"`q` must be a number, got {q!r}")
    if not 0 <= q <= 1:
        raise ValueError(f"`q` must lie in [0, 1], got {q!r}")
    return round((1 - float(q)) * numel)


def top_q(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Keep the entries of largest magnitude of each datum and set the others to zero.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real floating point.
    q : float
        The quantile: of the D entries of a datum exactly `round((1 - q) * D)` are kept, those of lowest index among
        equal magnitudes. NaN counts as infinite.
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. The gradient passes through the kept entries.

    Raises
    ------
    TypeError, ValueError
        `q` is not a number in [0, 1]; `param_ndim` does not fit `x`; `x` is not real floating point.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import top_q
    >>> top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    count = count_of(x, q, param_ndim)
    return map_rows(lambda rows: _keep(rows, count), x, param_ndim)


def top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Zero all but the entries of largest magnitude of each datum, in place; see `top_q`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Changed in place; any strides.
    q, param_ndim
        As for `top_q`.

    Returns
    -------
    Tensor
        `x`.

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


def signed_top_q(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """Top-q, then the sign, then division by the L1 norm: ±scale/k on the k kept entries that are not zero.

    The division is by the number of entries that are kept *and* not zero, so that the L1 norm of the result is `scale`
    unless the datum is zero.

    Parameters
    ----------
    x, q, param_ndim
        As for `top_q`.
    scale : float
        The L1 norm of the result.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. A kept NaN stays NaN.

    Raises
    ------
    TypeError, ValueError
        As `top_q`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import signed_top_q
    >>> signed_top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    count = count_of(x, q, param_ndim)
    return map_rows(lambda rows: _signed(rows, count, scale), x.detach(), param_ndim)


def signed_top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """The in-place form of `signed_top_q`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Changed in place; any strides.
    q, param_ndim, scale
        As for `signed_top_q`.

    Returns
    -------
    Tensor
        `x`.

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


def kept(rows: Tensor, count: int) -> Tensor:
    """Mask of the `count` entries of largest magnitude of each row, the first among equals; any device, no sync."""
    if count == 0 or count == rows.shape[1] or not may_look(rows):
        return _portable.kept(rows, count)
    a = rows.abs()
    a = torch.where(a.isnan(), torch.inf, a)
    # on a CPU half the time of `topk`
    threshold = a.kthvalue(a.shape[1] - count + 1, 1, keepdim=True).values
    above = a > threshold
    tied = a == threshold
    room = count - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= room))


def signed_rows(rows: Tensor, count: int) -> Tensor:
    """`signed_top_q` of a matrix with one datum a row, in float32 or float64."""
    if _searchable(rows, count):
        return signed_rows_(rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True), count, 1.0)
    return _signed(rows, count, 1.0)


def signed_rows_(rows: Tensor, count: int, scale: float) -> Tensor:
    """`signed_top_q_` of a matrix with one datum a row."""
    if count == 0:
        return rows.zero_()
    if is_large(rows) and count < rows.shape[1]:
        return signs_of_largest_(rows, count, scale)
    if not _searchable(rows, count):
        return rows.copy_(_signed(rows, count, scale))
    a = _magnitudes(rows)
    keep = scratch(a, 1)
    t, mean = _guess(a, count, keep)
    sums = torch.gt(a, t, out=keep).sum(1, keepdim=True)
    wrong = (sums - float(count) + (mean - mean)).nonzero()[:, 0]  # NaN where a row is not finite
    exact = _signed(rows.index_select(0, wrong), count, scale) if wrong.numel() else None
    rows.sign_().mul_(keep.mul_(scale / count))
    if exact is not None:
        rows.index_copy_(0, wrong, exact.to(rows.dtype))
    return rows


def _keep(rows: Tensor, count: int) -> Tensor:
    if _searchable(rows, count):
        keep, _, odd = _search(rows.detach(), count)
        if not odd.numel():
            return rows * keep.to(rows.dtype, copy=True) + 0.0
    return _masked(rows, kept(rows.detach(), count))


def _keep_(rows: Tensor, count: int) -> Tensor:
    if count == 0:
        return rows.zero_()
    if is_large(rows) and 0 < count < rows.shape[1]:
        return keep_largest_(rows, count)
    if not _searchable(rows, count):
        return rows.copy_(_masked(rows, kept(rows, count)))
    keep, _, odd = _search(rows, count)
    exact = _masked(rows[odd], kept(rows[odd], count)) if odd.numel() else None
    rows.mul_(keep.to(rows.dtype)).add_(0.0)
    if exact is not None:
        rows.index_copy_(0, odd, exact)
    return rows


def _masked(rows: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, rows, rows.new_zeros(()))


def _signed(rows: Tensor, count: int, scale: float) -> Tensor:
    mask = kept(rows, count)
    work = torch.promote_types(rows.dtype, torch.float32)
    sign = _masked(torch.where(rows.isnan(), rows, rows.sign()).to(work), mask)
    return sign * (scale / (mask & (rows != 0)).sum(1, keepdim=True).clamp_min(1).to(work))


def _searchable(rows: Tensor, count: int) -> bool:
    return 0 < count < rows.shape[1] and rows.shape[1] > 16 and may_look(rows)


def _search(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mark the largest entries of each row by 1, all others by 0.

    Returns
    -------
    keep : Tensor, shape (N, D)
        float32 or float64. An entry that is zero is never marked (kept or not, it is zero).
    sums : Tensor, shape (N, 1)
        How many are marked: `count`, or less where there are not so many that are not zero.
    odd : Tensor, shape (M,)
        Indices of rows that were left out: some entry is not finite (or their sum is not).
    """
    a = _magnitudes(rows)
    keep = scratch(a, 1)
    threshold, mean = _guess(a, count, keep)
    odd = (mean - mean).nonzero()[:, 0]
    torch.gt(a, threshold, out=keep)
    sums = keep.sum(1, keepdim=True)
    wrong = (sums - count).nonzero()[:, 0]
    if wrong.numel():
        part = a.index_select(0, wrong)
        mask = kept(part, count).logical_and_(part != 0).to(keep.dtype)
        keep.index_copy_(0, wrong, mask)
        sums.index_copy_(0, wrong, mask.sum(1, keepdim=True))
    return keep, sums, odd


def _magnitudes(rows: Tensor) -> Tensor:
    a = scratch(rows, 0, torch.promote_types(rows.dtype, torch.float32))
    return torch.abs(rows, out=a) if rows.dtype == a.dtype else a.copy_(rows).abs_()


def _guess(a: Tensor, count: int, above_t: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds that exactly `count` entries exceed, in most rows; and the means of the rows.

    The threshold of a row that is not finite may be anything.
    """
    # First guess: as if the entries were normal. `hazard` is the density there of those above, relative to them.
    share = count / a.shape[1]
    z = math.sqrt(2) * erfinv(1 - share)
    hazard = math.sqrt(2 / math.pi) * math.exp(-z * z / 2) / share
    mean = a.mean(1, keepdim=True)
    t = mean * (math.sqrt(math.pi / 2) * z)
    slope = mean * (math.sqrt(math.pi / 2) / hazard)  # of the threshold, in the logarithm of the count
    goal, chance = math.log(count + 0.5), 8.0 / count
    before = log_before = None
    miss = torch.zeros_like(t)
    for i in range(_PASSES):
        torch.gt(a, t, out=above_t)
        above = above_t.sum(1, keepdim=True)
        if i >= 2:
            miss = above - float(count)
            if i == _PASSES - 1 or int(torch.count_nonzero(miss.abs() > _PICKED)) <= a.shape[0] // 32:
                break
        log_ratio = above.add_(0.5).log_().sub_(goal)
        if before is not None and log_before is not None:
            # a secant, as far as the counts differ by more than chance
            change = log_before.sub_(log_ratio).abs_().add_(chance)
            slope.mul_(chance).add_(before.sub_(t).abs_()).div_(change)
        before, log_before = t, log_ratio
        t = torch.addcmul(t, slope, log_ratio).maximum(t * 0.25)
    return _picked(a, t, miss), mean


@functools.lru_cache(maxsize=256)
def erfinv(x: float) -> float:
    """The inverse of the error function."""
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64, device="cpu")))


def _picked(a: Tensor, t: Tensor, miss: Tensor) -> Tensor:
    """Move each threshold over the `miss` entries that are nearest to it, where these are few."""
    off = miss.nonzero()[:, 0]
    if not off.numel():
        return t
    m, start = miss.index_select(0, off), t.index_select(0, off)
    side = m.sign()
    part = torch.index_select(a, 0, off, out=scratch(a[: len(off)], 2))
    m = m.abs_()
    # The nearest entry on the right side has the largest reciprocal distance, the other side's are negative.
    near = torch.mul(part, side, out=scratch(part, 3)).sub_(start * side).reciprocal_()
    # A difference of near numbers is exact, so the entry is what comes out, rounded; a count confirms it in the end.
    value = start + side / near.amax(1, keepdim=True)
    far = (m > 1).nonzero()[:, 0]
    if far.numel():
        m = m.index_select(0, far)
        steps = min(int(m.amax().clamp_max_(_PICKED)), a.shape[1])
        order = near.index_select(0, far).topk(steps, 1).indices
        place = order.gather(1, m.long().sub_(1).clamp_(0, steps - 1))
        value.index_copy_(0, far, part.index_select(0, far).gather(1, place))
    value = torch.where(side > 0, value, torch.nextafter(value, torch.zeros_like(value)))
    return t.index_copy(0, off, value)
