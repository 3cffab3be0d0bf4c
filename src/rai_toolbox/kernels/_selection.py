"""The entries of largest magnitude of each row: a selection, never a sort.

On a CPU a selection by comparing and swapping (`topk`, `kthvalue`, `numpy.partition`) runs at 3 to 6 ns an entry, where
a pass of arithmetic takes 0.05. So the threshold is *searched*: count the entries above a guess, correct the guess by
the density of the entries there, and after three passes most rows of thousands are right or a few entries off; the
few are picked by their distance from the guess. A count of what is kept confirms each row, and the rare row that is
not confirmed (ties, NaN) is selected exactly.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rai_toolbox.kernels import _portable
from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._scratch import scratch

# How many entries a threshold may be off to be corrected by picking, and how many passes are made at most before.
_PICKED = 12
_PASSES = 8


def kept(rows: Tensor, count: int) -> Tensor:
    """Mask of the `count` entries of largest magnitude of each row, the first among equals; any device, no sync."""
    if count == 0 or count == rows.shape[1] or not can_branch_on_values(rows):
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
    return 0 < count < rows.shape[1] and rows.shape[1] > 16 and can_branch_on_values(rows)


def search(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mark the largest entries of each row by 1, all others by 0.

    Returns:
    keep, shape (N, D): float32 or float64. An entry that is zero is never marked (kept or not, it is zero).
    sums, shape (N, 1): how many are marked: `count`, or less where there are not so many that are not zero.
    odd, shape (M,): indices of rows that were left out: some entry is not finite (or their sum is not).
    """
    a = magnitudes(rows)
    keep = scratch(a, 1)
    threshold = guess(a, count, keep)
    odd = (threshold - threshold).nonzero()[:, 0]
    sums = torch.gt(a, threshold, out=keep).sum(1, keepdim=True)
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


def guess(a: Tensor, count: int, above_t: Tensor) -> Tensor:
    """Thresholds that exactly `count` entries exceed, in most rows; NaN or infinite for a row that is not finite.

    Calls are few: an operator on numbers per row takes longer to call than to run, most of all where another thread
    calls them too.
    """
    # First guess: as if the entries were normal. `hazard` is the density there of those above, relative to them.
    share = count / a.shape[1]
    z = math.sqrt(2) * erfinv(1 - share)
    hazard = math.sqrt(2 / math.pi) * math.exp(-z * z / 2) / share
    unit = math.sqrt(math.pi / 2) / a.shape[1]
    sums = a.sum(1, keepdim=True)
    t, slope = sums * (unit * z), sums * (unit / hazard)  # of the threshold, in the logarithm of the count
    goal, chance = math.log(count + 0.5), 8.0 / count
    before = change = None
    for i in range(_PASSES):
        above = torch.gt(a, t, out=above_t).sum(1, keepdim=True)
        if i >= 2:
            miss = above - float(count)
            if i == _PASSES - 1 or int(torch.count_nonzero(miss.abs() > _PICKED)) <= a.shape[0] // 32:
                return _picked(a, t, miss, slope, count)
        log_ratio = above.add_(0.5).log_().sub_(goal)
        if before is not None and change is not None:
            # a secant, as far as the counts differ by more than chance
            slope.mul_(chance).add_(change.abs_()).div_(before.sub_(log_ratio).abs_().add_(chance))
        before, change = log_ratio, slope * log_ratio
        change = torch.maximum(change, t * -0.75)
        t = t + change
    raise AssertionError("the last pass returns")


@functools.lru_cache(maxsize=256)
def erfinv(x: float) -> float:
    """The inverse of the error function."""
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64, device="cpu")))


def _picked(a: Tensor, t: Tensor, miss: Tensor, slope: Tensor, count: int) -> Tensor:
    """Move each threshold over the `miss` entries that are nearest to it, where these are few."""
    off = miss.nonzero()[:, 0]
    if not off.numel():
        return t
    part = torch.index_select(a, 0, off, out=scratch(a[: len(off)], 2))
    m, start = miss.index_select(0, off), t.index_select(0, off)
    # One more step brings most of these rows within an entry.
    log_ratio = torch.log((m + (count + 0.5)).mul_(1 / (count + 0.5)))
    moved = torch.addcmul(start, slope.index_select(0, off), log_ratio)
    left = torch.gt(part, moved, out=scratch(part, 3)).sum(1, keepdim=True).sub_(count)
    closer = (left.abs() < m.abs()).logical_and_(moved >= 0)
    m, start = torch.where(closer, left, m), torch.where(closer, moved, start)
    side = m.sign()
    m.abs_()
    # The nearest entry on the right side has the largest reciprocal distance, the other side's are negative.
    near = part.sub_(start).mul_(side).reciprocal_()
    nearest = near.amax(1, keepdim=True)
    far = (m > 1).nonzero()[:, 0]
    if far.numel():
        m = m.index_select(0, far).clamp_max_(min(_PICKED, a.shape[1]))
        order = near.index_select(0, far).topk(int(m.amax()), 1).values
        nearest.index_copy_(0, far, order.gather(1, m.long().sub_(1)))
    # A difference of near numbers is exact, so the entry is what comes out, rounded; a count confirms it in the end.
    value = start.add_(side / nearest)
    below = torch.nextafter(value, torch.zeros_like(value))
    return t.index_copy(0, off, torch.where(side < 0, below, value))
