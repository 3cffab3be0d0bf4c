"""The entries of largest magnitude of each row: a selection, never a sort.

On a CPU a selection by comparing and swapping (`topk`, `kthvalue`, `numpy.partition`) runs at 3 to 6 ns an entry, where
a pass of arithmetic takes 0.05. So the threshold is *searched*: count the entries above a guess, correct the guess by
the density of the entries there, and after two passes most rows of thousands are right or a few entries off; the
few are picked by their distance from the guess. A count of what is kept confirms each row, and the rare row that is
not confirmed (ties, NaN) is selected exactly.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from rai_toolbox.kernels import _portable
from rai_toolbox.kernels._machine import may_look
from rai_toolbox.kernels._norms import divisor_near
from rai_toolbox.kernels._scratch import scratch

# Numbers, one a row: shape (N, 1), float32 or float64.
_Column: TypeAlias = Any

# How many entries a threshold may be off to be corrected by picking, how many passes are made at most before, and how
# often it is done again for the rows that are not right by then.
_PICKED = 6
_PASSES = 8
_ROUNDS = 2
_LITTLE_NUMEL = 2**14

# In about so many segments of a row the entries nearest to a threshold are looked for.
_SEGMENTS = 48


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


def is_searched(rows: Tensor, count: int) -> bool:
    """Whether a threshold is searched for: on a CPU, in rows of some length."""
    return 0 < count < rows.shape[1] and rows.shape[1] > 16 and may_look(rows)


def search(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
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
    a = magnitudes(rows)
    keep = scratch(a, 1)
    sums, mean = mark_largest_(a, count, keep)
    odd = (mean - mean).nonzero()[:, 0]
    wrong = (sums - count).nonzero()[:, 0]
    if wrong.numel():
        part = a.index_select(0, wrong)
        mask = kept(part, count).logical_and_(part != 0).to(keep.dtype)
        keep.index_copy_(0, wrong, mask)
        sums.index_copy_(0, wrong, mask.sum(1, keepdim=True))
    return keep, sums, odd


def magnitudes(rows: Tensor) -> Tensor:
    """|x| in scratch memory, in float32 or float64."""
    a = scratch(rows, 0, torch.promote_types(rows.dtype, torch.float32))
    return torch.abs(rows, out=a) if rows.dtype == a.dtype else a.copy_(rows).abs_()


def mark_largest_(a: Tensor, count: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mark entries of each row of magnitudes in `keep`: in most rows the `count` largest ones.

    What is computed for a row, and not for its entries, numpy does: a call of torch takes several times as long.

    Returns
    -------
    sums, mean : Tensor, shape (N, 1)
        How many are marked, and the means of the rows. What is marked in a row that is not finite may be anything.
    """
    with np.errstate(all="ignore"):
        t, miss, mean = _guess(a, count, keep)
        t = _picked(a, t, miss)
        sums = torch.gt(a, torch.from_numpy(t), out=keep).sum(1, keepdim=True)
        for _ in range(_ROUNDS):  # rows in which two of the entries that were passed over lay in one segment
            miss = sums.numpy() - count
            off = miss[:, 0].nonzero()[0]
            if off.size * a.shape[1] <= _LITTLE_NUMEL:  # these are selected exactly in less time
                break
            rows = torch.from_numpy(off)
            part = torch.index_select(a, 0, rows, out=scratch(a[: off.size], 4))
            moved = _picked(part, t[off], miss[off])
            mask = torch.gt(part, torch.from_numpy(moved), out=scratch(part, 5))
            t[off] = moved
            keep.index_copy_(0, rows, mask)
            sums.index_copy_(0, rows, mask.sum(1, keepdim=True))
    return sums, mean


def _guess(a: Tensor, count: int, above_t: Tensor) -> tuple[_Column, _Column, Tensor]:
    """Thresholds that about `count` entries exceed, by how many these are too many, and the means of the rows.

    The threshold of a row that is not finite may be anything.
    """
    # First guess: as if the entries were normal. `hazard` is the density there of those above, relative to them.
    share = count / a.shape[1]
    z = math.sqrt(2) * erfinv(1 - share)
    hazard = math.sqrt(2 / math.pi) * math.exp(-z * z / 2) / share
    mean = a.mean(1, keepdim=True)
    t = mean.numpy() * (math.sqrt(math.pi / 2) * z)
    slope = mean.numpy() * (math.sqrt(math.pi / 2) / hazard)  # of the threshold, in the logarithm of the count
    goal, chance = math.log(count + 0.5), 8.0 / count
    before = log_before = above = cast("Any", None)
    for i in range(_PASSES):
        above = torch.gt(a, torch.from_numpy(t), out=above_t).sum(1, keepdim=True).numpy()
        if i and (i == _PASSES - 1 or np.count_nonzero(abs(above - count) > _PICKED) <= a.shape[0] // 8):
            break
        log_ratio = np.log(above + 0.5) - goal
        if before is not None:
            # a secant, as far as the counts differ by more than chance
            slope = (slope * chance + abs(before - t)) / (abs(log_before - log_ratio) + chance)
        before, log_before = t, log_ratio
        t = np.maximum(t + slope * log_ratio, t * 0.25)
    return t, above - count, mean


@functools.lru_cache(maxsize=256)
def erfinv(x: float) -> float:
    """The inverse of the error function."""
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64, device="cpu")))


def _picked(a: Tensor, t: _Column, miss: _Column) -> _Column:
    """Move each threshold over the `miss` entries that are nearest to it: right in most rows where these are few."""
    side = np.sign(miss)
    start = np.where(side > 0, np.nextafter(t, t.dtype.type(np.inf)), t)
    # The nearest entry on the right side has the largest reciprocal distance, the other side's are negative.
    near = torch.mul(a, torch.from_numpy(side), out=scratch(a, 3)).sub_(torch.from_numpy(start * side)).reciprocal_()
    steps = abs(miss).clip(1, _PICKED).astype(np.int64)
    segments = divisor_near(a.shape[1], _SEGMENTS)
    if segments:
        # The nearest of each of some strided segments. No two of the few are in one, or a count will show it.
        nearest = near.view(len(a), -1, segments).amax(1).numpy()
        nearest.sort(axis=1)  # of these, a tenth of the time of `topk`
        near_ones = nearest[np.arange(len(a))[:, None], segments - steps]
    else:
        nearest = near.topk(_PICKED, 1).values.numpy()
        near_ones = nearest[np.arange(len(a))[:, None], steps - 1]
    # A difference of near numbers is exact, so the entry is what comes out, rounded; a count confirms it in the end.
    value = start + side / near_ones
    return np.where(miss == 0, t, np.where(side > 0, value, np.nextafter(value, t.dtype.type(0))))
