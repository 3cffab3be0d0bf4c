"""The entries of largest magnitude of each row: a selection, never a sort.

On a CPU a selection by comparing and swapping (`topk`, `kthvalue`, `numpy.partition`) runs at 3 to 11 ns an entry,
where a pass of arithmetic takes 0.1. So a threshold is *searched*. Entries above a guess are counted, as bytes eight at
a time; then those above a second guess, which is meant to lie on the other side of the threshold. The few entries
between the two are all that is ranked.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rai_toolbox.kernels import _portable
from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._scratch import memory

# After so many counts a row that has no threshold yet is selected exactly.
_PASSES = 8

# Up to this length the two guesses come after one that brings them closer together: ranking takes longer than counting.
_SHORT = 1024

# How many standard deviations of a count the second guess goes beyond the threshold.
_MARGIN = 3.0

# The bytes of a word sum up without a carry over so many words.
_WORDS = 255


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


def search(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mark the `count` entries of largest magnitude of each row by 1, all others by 0.

    Returns:
    keep, shape (N, D): float32 or float64, in scratch memory. Marked entries are not zero.
    left, shape (M,): indices of rows whose marks mean nothing: some entry is not finite, or entries at the threshold
        are equal or zero.
    """
    # Numbers per row are columns here. A call on some hundred of them takes 3 µs whatever it does: there are few calls.
    length = rows.shape[1]
    width = 8 * math.prod(_words(length))
    padded = memory((len(rows), width), 0, torch.promote_types(rows.dtype, torch.float32))
    a = padded if width == length else padded[:, :length]
    if rows.dtype == a.dtype:
        torch.abs(rows, out=a)
    else:
        a.copy_(rows).abs_()
    if width > length:
        padded[:, length:] = -1.0  # below every threshold
    found, is_left = _thresholds(padded, length, count, a.sum(1, keepdim=True))
    return torch.gt(a, found, out=a), is_left.nonzero()[:, 0]


@functools.lru_cache(maxsize=256)
def erfinv(x: float) -> float:
    """The inverse of the error function."""
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64, device="cpu")))


@functools.lru_cache(maxsize=256)
def _words(length: int) -> tuple[int, int]:
    """As how many groups of how many words of eight bytes the marks of a row are summed."""
    words = -(-length // 8)
    groups = -(-words // _WORDS)
    return groups, -(-words // groups)


class _Normal(NamedTuple):
    """What the threshold of a row would be if its entries were normal, in units of the sum of their magnitudes."""

    threshold: float
    slope: float  # of the threshold, in the logarithm of how many exceed it
    # What to multiply a threshold by that so many exceed, to get to the right one, or to its other side.
    nearer: Tensor
    beyond: Tensor


@functools.lru_cache(maxsize=64)
def _normal(length: int, count: int, dtype: torch.dtype) -> _Normal:
    share = count / length
    z = math.sqrt(2) * erfinv(1 - share)
    hazard = math.sqrt(2 / math.pi) * math.exp(-z * z / 2) / share  # the density of those above, relative to them
    unit = math.sqrt(math.pi / 2) / length
    with torch.inference_mode(False), torch.device("cpu"):  # it is kept
        miss = torch.arange(-count, length + 1 - count, dtype=torch.float64)
        nearer, beyond = (
            (_log(miss, count) - goal).div_(hazard * z).clamp_min_(-0.75).add_(1.0).to(dtype)
            for goal in (math.log(count + 0.5), _goal(miss, count))
        )
    return _Normal(unit * z, unit / hazard, nearer, beyond)


def _log(miss: Tensor, count: int) -> Tensor:
    return torch.log(miss + (count + 0.5))


def _goal(miss: Tensor, count: int) -> Tensor:
    """The logarithm of what to count on the other side of the threshold from where `miss` too many were counted."""
    beyond = count - miss.abs().add_(3.0).sqrt_().mul_(_MARGIN).copysign_(miss)
    return beyond.clamp_min_(0.3 * count).add_(0.5).log_()


def _thresholds(a: Tensor, length: int, count: int, sums: Tensor) -> tuple[Tensor, Tensor]:
    """What exactly `count` magnitudes of each row exceed, and for which rows it is not that.

    a, shape (N, W): the first `length` entries of a row; the others are negative.
    sums, shape (N, 1): of the entries; for none that is 0 or not finite anything is found.
    """
    usable = None
    least, largest = torch.aminmax(sums)
    if not (float(least) > 0 and float(largest) < math.inf):
        usable = (sums > 0).logical_and_(sums < math.inf)
        sums = sums.where(usable, 1.0)
    normal = _normal(length, count, a.dtype)
    before, above = memory(a.shape, 1, torch.bool), memory(a.shape, 2, torch.bool)
    last, slope = sums * normal.threshold, None
    if length <= _SHORT:
        number = _above(a, last).sum(1, keepdim=True).to(torch.int64)
        last = last * normal.nearer.take(number)
    number = _exceed(a, last, before, length)
    miss_before = number - count
    threshold = last * normal.beyond.take(number)
    passes = 1
    while True:
        passes += 1
        miss = _exceed(a, threshold, above, length).sub_(count)
        between = torch.sub(miss, miss_before).abs_()
        # both on one side, or too many between them
        is_wrong = torch.maximum(miss * miss_before, between - (48 + length // 32)) > 0
        if usable is not None:
            is_wrong.logical_and_(usable)
        wrong = is_wrong.nonzero()[:, 0]
        if 16 * len(wrong) <= len(a) or passes == _PASSES:
            break
        slope = sums * normal.slope if slope is None else slope
        # a secant, as far as the counts differ by more than chance
        log = _log(miss.to(a.dtype), count)
        apart = _log(miss_before.to(a.dtype), count).sub_(log).abs_().add_(8.0 / count)
        slope = (slope * (8.0 / count)).add_((threshold - last).abs_()).div_(apart)
        change = torch.maximum((log - _goal(miss.to(a.dtype), count)).mul_(slope), threshold * -0.75)
        last, threshold = threshold, threshold + change
        above, before, miss_before = before, above, miss
    need = torch.minimum(miss, miss_before).neg_()
    is_out = is_wrong if usable is None else is_wrong.logical_or_(usable.logical_not_())
    out = wrong if usable is None else is_out.nonzero()[:, 0]
    if len(out):
        for numbers in (need, between, above, before):
            numbers.index_fill_(0, out, 0)
    found, is_left = _ranked(a, above, before, torch.minimum(last, threshold), between, need)
    if len(out):
        is_left.logical_or_(is_out)
    if len(wrong):
        largest = a.index_select(0, wrong).topk(count + 1, 1).values
        least, next_ = largest[:, count - 1 : count], largest[:, count:]
        found.index_copy_(0, wrong, next_)
        is_left.index_copy_(0, wrong, (least <= next_).logical_or_(least <= 0))
    return found, is_left


def _exceed(a: Tensor, threshold: Tensor, marks: Tensor, length: int) -> Tensor:
    """Mark what is above a number per row, and count it."""
    marks.copy_(_above(a, threshold))
    groups, words = _words(length)
    sums = marks.view(torch.int64).view(-1, words).sum(1)
    return sums.view(torch.uint8).view(len(marks), 8 * groups).sum(1, keepdim=True, dtype=torch.int64)


def _above(a: Tensor, threshold: Tensor) -> Tensor:
    """1 for what is above a number per row, else 0; in scratch memory."""
    # Comparisons whose results are numbers are vectorized, and so is their conversion; those to bool are not.
    return torch.gt(a, threshold, out=memory(a.shape, 3, a.dtype))


def _ranked(
    a: Tensor, one: Tensor, other: Tensor, lower: Tensor, between: Tensor, need: Tensor
) -> tuple[Tensor, Tensor]:
    """What exactly the `need` largest of the entries exceed whose marks differ, and where there is no such number.

    lower, between, shape (N, 1): a number below these entries, and how many they are.
    """
    differ = one.view(torch.int64).bitwise_xor_(other.view(torch.int64)).view(-1)
    words = differ.nonzero()[:, 0]
    places = differ.index_select(0, words).view(torch.uint8).nonzero()[:, 0]
    entries = words.index_select(0, places >> 3).mul_(8).add_(places & 7)
    values = a.view(-1).index_select(0, entries)
    # One row of a table for each, and after them so many of the largest number that what is looked for is at one rank
    # of all rows; zeros between them.
    rank = int(need.max()) + 1
    room = rank - need
    width = int((between + room).max()) + 1
    table = torch.lt(_down_from(width, a.dtype), room, out=a.new_empty(len(a), width)).mul_(torch.finfo(a.dtype).max)
    counts = between[:, 0]
    shifts = torch.arange(0, len(a) * width, width, device="cpu").add_(counts).sub_(counts.cumsum(0))
    shifts = shifts.repeat_interleave(counts, output_size=len(values))
    table.view(-1).index_copy_(0, shifts.add_(torch.arange(len(values), device="cpu")), values)
    found = torch.maximum(table.kthvalue(width - rank, 1, keepdim=True).values, lower)
    return found, torch.gt(table, found, out=table).sum(1, keepdim=True) != rank


def _down_from(width: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(width - 1, -1, -1, dtype=dtype, device="cpu")
