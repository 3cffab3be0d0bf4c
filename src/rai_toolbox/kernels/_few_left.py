"""Nearest points of an L1 ball or the simplex where few entries of a row stay: those are looked for, the rest is zero.

The largest entry of each of some 64 segments of a row gives a threshold that is not too high, since more entries
only raise it. What exceeds it lies in a few segments. What is left of those decides, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.kernels._norms import divisor_near
from rai_toolbox.kernels._scratch import scratch

# With more segments of a row than these, on average, passes over all of it are as fast.
_FEW = 32

# How many steps find the level of the largest entries of the segments; fewer find one that is higher.
_STEPS = 3


def with_few_left(x: Tensor, total: Tensor, *, signed: bool, in_place: bool) -> Tensor | None:
    """The nearest points with Σz = total and z ≥ 0, or of |x| with the signs of x, where they are sparse.

    x, shape (N, D): float32 or narrower. total, shape (N, 1) or (1, 1): float32, between 1e-12 and 1e12.

    Returns None, and has changed nothing, unless each row is clearly outside, none is too large for float32, and few
    entries of each stay. With `in_place` the result is in the memory of `x`, if that is contiguous.
    """
    length = x.shape[1]
    segments = divisor_near(length, 32)
    if not segments:
        return None
    y = x.detach()
    if signed and x.dtype == torch.float32:
        y = torch.abs(x, out=scratch(x, 0))
    elif x.dtype != torch.float32 or not x.is_contiguous():
        y = scratch(x, 0, torch.float32).copy_(x)
        y = y.abs_() if signed else y
    highest = y.view(len(x), -1, segments).amax(1)
    sums = (highest if signed else highest.relu()).sum(1, keepdim=True)
    beyond, most = torch.aminmax(sums.sub(total, alpha=1.001 + 8 * torch.finfo(x.dtype).eps))
    if not (float(beyond) > 0 and float(most) < 1e12):
        return None
    top = highest.amax(1, keepdim=True)
    depth = torch.sub(top, highest, out=scratch(highest, 7))
    level, active, part = total, scratch(highest, 8), scratch(highest, 9)
    for _ in range(_STEPS):  # Michelot's: a level of too many entries is too high
        torch.lt(depth, level, out=active)
        level = torch.mul(active, depth, out=part).sum(1, keepdim=True).add_(total).div_(active.sum(1, keepdim=True))
    least = top.sub(level, alpha=1 + 1e-5).sub_(top.abs(), alpha=1e-5)  # a little lower, since it is rounded
    some = torch.gt(highest, least).nonzero()
    if len(some) > _FEW * len(x):
        return None
    rows, places, values = _larger(y, segments, some, least)
    depths = top[:, 0].double().index_select(0, rows).sub_(values)
    while True:  # those above the level go, until there are none
        levels = rows.bincount(depths, len(x)).add_(total[:, 0]).div_(rows.bincount(minlength=len(x)))
        stay = levels.index_select(0, rows).sub_(depths)
        active = (stay > 0).nonzero()[:, 0]
        if len(active) == len(stay):
            break
        rows, places, depths = (part.index_select(0, active) for part in (rows, places, depths))
    if signed:
        stay.copysign_(x.reshape(-1).index_select(0, places))
    out = x.zero_() if in_place and x.is_contiguous() else torch.zeros(x.shape, dtype=x.dtype, device="cpu")
    out.view(-1).index_copy_(0, places, stay.to(out.dtype))
    return out


def _larger(y: Tensor, segments: int, some: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each row that are larger than its `least`: their rows, where they are in all, and what they are.

    some, shape (M, 2): the rows and numbers of the segments that have such entries; a segment is strided.
    """
    rows, columns = some.unbind(1)
    values = y.view(len(y), -1, segments)[rows, :, columns]
    which, line = (values > least.index_select(0, rows)).nonzero().unbind(1)
    rows = rows.index_select(0, which)
    places = (rows * y.shape[1]).add_(line, alpha=segments).add_(columns.index_select(0, which))
    return rows, places, values[which, line]
