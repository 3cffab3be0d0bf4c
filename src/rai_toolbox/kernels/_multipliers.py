"""The one unknown of a projection: the multiplier of its norm constraint, per datum.

Every projection on a ball (with a box) is, entry by entry, a function of one number per datum, found where the norm of
the result is the radius. Matrices hold one datum per row; numbers per datum have shape (N, 1). This is the form for
CPUs: an iteration ends when every row is seen to have converged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rai_toolbox.kernels import _portable
from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._norms import divisor_near, row_sums
from rai_toolbox.kernels._scratch import scratch

# Newton's steps end after 3 to 12 on these piecewise functions; halving, where they leave the bracket, after 75.
_STEPS = 160

# Of so many entries of least depth a first level is computed.
_FEW = 8

_EXCESS_STEP = 1 / 64

Evaluation = Callable[[Tensor], tuple[Tensor, Tensor]]
Parts = Callable[[], Iterable[tuple[Tensor, Tensor | None, Tensor]]]


def level_for_sum(depth: Tensor, total: Tensor) -> Tensor:
    """Solve Σ max(level - depth, 0) = total for the level (water-filling).

    depth, shape (N, D): ≥ 0 and 0 somewhere in each row: the distance of each entry below the largest of its row. (A
        threshold that is subtracted from the entries would lose the digits of a small total of large entries.)
    total, shape (N, 1): ≥ 0 and finite.

    Returns (N, 1): in [0, total].
    """
    if not can_branch_on_values(depth):
        return _portable.level_for_sum(depth, total)
    return _descended(depth, total, _first_level(depth, total))[0]


def nearest_with_sum(y: Tensor, total: Tensor, sums: Tensor) -> Tensor:
    """The nearest points with entries ≥ 0 that sum to `total`, in scratch memory; where looking is free.

    y, shape (N, D): overwritten: by how much each entry is below the largest of its row, which is > 0.
    total, sums, shape (N, 1): > 0; `sums` are of |y|. The first guess is the level of as many numbers from a normal
        distribution. (Where few entries are active, `with_few_left` is faster.)
    """
    length = y.shape[1]
    deviation = sums * (math.sqrt(math.pi / 2) / length)
    z = torch.searchsorted(_minus_expected_excess(), -total / (deviation * length)).to(y.dtype) * _EXCESS_STEP
    top = y.amax(1, keepdim=True)
    depth = torch.sub(top, y, out=y)
    level = top - z * deviation
    return _even(depth, total, *_descended(depth, total, torch.where((level > 0) & (level < total), level, total)))


def _even(depth: Tensor, total: Tensor, level: Tensor, excess: Tensor, found: Tensor, step: Tensor) -> Tensor:
    """The excess, changed by the last step where a level large beside most of it has not the digits of its sum."""
    if bool(((total - found).abs() > torch.finfo(depth.dtype).eps * total).any()):
        torch.sub(level, depth, out=excess).add_(step).relu_()
    return excess


@functools.lru_cache(maxsize=1)
def _minus_expected_excess() -> Tensor:
    """-E max(|x| - θ, 0) of a standard normal x, for θ = 0, `_EXCESS_STEP`, ..."""
    with torch.inference_mode(False):  # it is kept
        theta = torch.arange(512, dtype=torch.float64, device="cpu") * _EXCESS_STEP
        density = torch.exp(-theta.square() / 2) / math.sqrt(2 * math.pi)
        return (theta * torch.special.erfc(theta / math.sqrt(2)) - 2 * density).to(torch.float32)


def _descended(depth: Tensor, total: Tensor, level: Tensor, slot: int = 1) -> tuple[Tensor, ...]:
    """Level, from a first guess; excess max(level - depth, 0); its sums; and the step Newton's method makes next."""
    # Σ max(level - depth, 0) is convex: from wherever it starts, Newton's method is above the root after one step, then
    # descends to it, and is there when a step leaves the count as it was.
    excess, active = scratch(depth, slot), scratch(depth, slot + 1)
    count = None
    while True:
        before = count
        found = row_sums(torch.sub(level, depth, out=excess).relu_())
        count = torch.sign(excess, out=active).sum(1, keepdim=True)
        step = (total - found) / count.clamp_min(1)
        if before is None:
            level = level + step
            continue
        rest = (count != before).nonzero()[:, 0]
        if not rest.numel():
            return level, excess, found, step
        step.clamp_max_(0)  # one that goes up again has met the last digit
        if slot == 1 and 4 * rest.numel() <= depth.shape[0]:
            break
        level = level + step
    # The few rows that are left go on by themselves.
    some = _descended(*(v.index_select(0, rest) for v in (depth, total, level + step)), slot=7)
    return tuple(v.index_copy_(0, rest, part) for v, part in zip((level, excess, found, step), some, strict=True))


def _first_level(depth: Tensor, total: Tensor) -> Tensor:
    """A level that is right where few entries are active, and else too high."""
    segments = divisor_near(depth.shape[1], 32)
    if not segments:
        return total
    # The entries of least depth of strided segments, which a pass of arithmetic finds: the level is right if all that
    # are active are among them.
    least = depth.view(depth.shape[0], -1, segments).amin(1).topk(_FEW, 1, largest=False).values
    levels = (total + least.cumsum(1)) / torch.arange(1, _FEW + 1, dtype=depth.dtype, device=depth.device)
    active = (least < levels).sum(1, keepdim=True).clamp_min_(1)
    return levels.gather(1, active - 1).minimum(total)


class Shift(NamedTuple):
    """What is taken from every y of a row: first the offset, then θ, so that a small sum keeps its digits."""

    offset: Tensor | None
    theta: Tensor
    error: Tensor  # of the sum, relative to the total

    def of(self, y: Tensor) -> Tensor:
        """y less the offset, less θ."""
        return y - self.theta if self.offset is None else (y - self.offset) - self.theta


def shift_for_sum(parts: Parts, bottom: Tensor, top: Tensor, total: Tensor, start: Tensor | None = None) -> Shift:
    """Solve Σ clip(y - θ, low, high) = total for θ in [bottom, top], where the sum at `bottom` is more than `total`.

    parts: gives `(y, low, high)` of some columns of all rows, then of the next: y finite, 0 ≤ low ≤ high, Σ low ≤
        total; low None is 0.
    bottom, top, shape (N, 1): no y is larger than `top`.
    total, start, shape (N, 1): `start` is a first guess.
    """

    def evaluate_at(offset: Tensor | None) -> Evaluation:
        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            excess, free = -total, torch.zeros_like(total)
            for y, low, high in parts():
                work = scratch(y, 1)
                shifted = torch.sub(y if offset is None else torch.sub(y, offset, out=work), theta, out=work)
                clipped = _clip(shifted, low, high, scratch(y, 2))
                excess = excess + clipped.sum(1, keepdim=True)
                free = free + torch.eq(clipped, shifted, out=work).sum(1, keepdim=True)
            return excess, excess / free

        return evaluate

    first = bottom if start is None else start
    theta, error, bottom, top = _descend(evaluate_at(None), first, bottom, top, total)
    if float(error.amax()) <= _coarse(total.dtype):
        return Shift(None, theta, error)
    # Where the last digit of θ is more than the sum may be off: the same again for what is left of y, counted from
    # the upper end of the bracket, which is then an entry of y or as good as one.
    bottom = bottom - top - bottom.abs() * (8 * torch.finfo(total.dtype).eps)
    zero = torch.zeros_like(total)
    rest, error, _, _ = _descend(evaluate_at(top), theta - top, bottom, zero, total)
    return Shift(top, rest, error)


class Scale(NamedTuple):
    """What every y of a row is multiplied by, in two steps, so that a small factor keeps its digits."""

    first: Tensor
    second: Tensor | None
    error: Tensor  # of the norm, relative to 1

    def of(self, y: Tensor) -> Tensor:
        """y times both."""
        return y * self.first if self.second is None else y * self.first * self.second


def scale_for_square_sum(parts: Parts, start: Tensor, top: Tensor) -> Scale:
    """Solve Σ clip(t y, low, high)² = 1 for t in [0, top], where the sum at `top` is more than 1.

    parts: as for `shift_for_sum`, with Σ low² ≤ 1.
    start, top, shape (N, 1): `start` is a first guess.
    """

    def evaluate_at(factor: Tensor | None) -> Evaluation:
        def evaluate(minus_t: Tensor) -> tuple[Tensor, Tensor]:
            excess, free = -torch.ones_like(minus_t), torch.zeros_like(minus_t)
            for y, low, high in parts():
                work, value = scratch(y, 1), scratch(y, 2)
                scaled = torch.mul(y if factor is None else torch.mul(y, factor, out=work), -minus_t, out=work)
                clipped = _clip(scaled, low, high, value)
                moving = torch.eq(clipped, scaled, out=work).mul_(clipped)
                excess = excess + torch.mul(clipped, clipped, out=value).sum(1, keepdim=True)
                free = free + moving.square_().sum(1, keepdim=True)
            # with the clipped entries held: t'² free / t² = free - excess
            grown = (1 - excess / free).clamp_min(0).sqrt()
            return excess / 2, minus_t * (grown - 1)

        return evaluate

    # the sum falls in -t as it does in θ above
    largest_t = torch.finfo(start.dtype).max / 4
    one = torch.ones_like(start)
    bottom, first = -top.clamp_max(largest_t), -start.clamp_max(largest_t)
    minus_t, error, _, _ = _descend(evaluate_at(None), first, bottom, torch.zeros_like(top), one)
    if float(error.amax()) <= _coarse(start.dtype):
        return Scale(-minus_t, None, error)
    rest, error, _, _ = _descend(evaluate_at(-minus_t), -one, -4 * one, -one / 4, one)
    return Scale(-minus_t, -rest, error)


def _descend(
    evaluate: Evaluation, x: Tensor, bottom: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the root of a falling function by Newton's steps, halving a bracket where they leave it.

    Returns the root, |excess| relative to `total` there, and the bracket.
    """
    fine = _coarse(x.dtype) / 2
    best, least = x, torch.full_like(x, torch.inf)
    relative = torch.where(total > 0, total, torch.ones_like(total))
    for _ in range(_STEPS):
        excess, step = evaluate(x)
        error = excess.abs() / relative
        better = error < least
        best = torch.where(better, x, best)
        least = torch.where(better, error, least)
        if bool((least <= fine).all()):
            break
        above = excess > 0
        bottom = torch.where(above, torch.maximum(bottom, x), bottom)
        top = torch.where(above, top, torch.minimum(top, x))
        new = x + step
        middle = _middle(bottom, top)
        new = torch.where((new > bottom) & (new < top), new, middle)
        # a step below the last digit: a bracket that rounding has closed on the wrong side must not be halved
        moved = (new != x) & (least > fine) & ~(step.abs() <= 2 * torch.finfo(x.dtype).eps * x.abs())
        if not bool(moved.any()):
            break
        x = torch.where(moved, new, x)
    return best, least, bottom, top


def _middle(bottom: Tensor, top: Tensor) -> Tensor:
    """Between two numbers: by exponent while these differ, so that a bracket of 600 decades takes 11 halvings."""
    small, large = bottom.abs(), top.abs()
    small, large = torch.minimum(small, large), torch.maximum(small, large)
    small = small.clamp_min(torch.finfo(bottom.dtype).smallest_normal)
    geometric = (bottom + top).sign() * small.sqrt() * large.sqrt()
    return torch.where((bottom * top >= 0) & (large > 4 * small), geometric, (bottom + top) / 2)


def _coarse(dtype: torch.dtype) -> float:
    """The error of a sum that shows a root was not resolved."""
    return 2 * torch.finfo(dtype).eps


def _clip(x: Tensor, low: Tensor | None, high: Tensor, out: Tensor) -> Tensor:
    raised = torch.clamp_min(x, 0, out=out) if low is None else torch.maximum(x, low, out=out)
    return torch.minimum(raised, high, out=out)
