"""Triton kernels with one program for each datum: the largest entries, and nearest points of the L1 ball and simplex.

A program reads its datum several times; after the first, from the cache of the device. A projection searches one number
per datum, within a bracket that gets narrower. Each pass over the datum tries two guesses: Newton's, which mostly needs
few passes, and the middle of the bracket, which bounds their number.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from rai_toolbox.kernels._device_scaling import (
    COUNT,
    LENGTH,
    OFFSET,
    ROW,
    TENSOR,
    address,
    eights,
    field,
    radius_of,
    rounded,
    widened,
)

# A search ends where the sum differs from the radius by no more than this share of it; a float32 resolves 2^-24.
NEAR = tl.constexpr(2.0**-42)
# The most passes of a search: by then halving has narrowed every bracket to one number.
PASSES = tl.constexpr(140)


@triton.jit
def whole_datum(table, n, addresses, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to this program's datum, and its length."""
    length = field(table, n, LENGTH)
    offset = field(table, n, OFFSET)
    if ALIGNED:
        length = eights(length)
        offset = eights(offset)
    return address(addresses, field(table, n, TENSOR), T, ALIGNED) + offset, length


@triton.jit
def magnitude_bits(x, VERTEX: tl.constexpr):
    """The bits of |x|, an integer that orders as |x| does; NaN is as infinity or, with `VERTEX`, just above it."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800001 if VERTEX else 0x7F800000)


@triton.jit
def keep_largest(
    table, n: tl.int32, addresses, scale: tl.float64, radii, counts,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SIGNED: tl.constexpr, RADII: tl.constexpr,
    COUNTS: tl.constexpr, VERTEX: tl.constexpr,
):  # fmt: skip
    """Zero all but the `count` entries of largest magnitude, the first among equals.

    `SIGNED`: these become their signs, divided by how many of them are not zero, times the scale. `VERTEX`: one is
    kept, and the sign of zero is 1.
    """
    pointer, length = whole_datum(table, n, addresses, T, ALIGNED)
    count = field(table, n, COUNT)
    if COUNTS:
        count = tl.minimum(tl.load(counts + field(table, n, ROW)), length)
    columns = tl.arange(0, BLOCK)
    bins = tl.arange(0, 512)
    # Find the bits of the threshold, eight at a time: count each value of the next eight among the entries whose higher
    # bits are those found so far.
    prefix = tl.zeros([], tl.int32)
    room = count.to(tl.int32)
    for step in tl.static_range(4):
        seen = tl.zeros([512], tl.int32)
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            bits = magnitude_bits(widened(tl.load(pointer + start + columns, mask=mask, other=0.0)), VERTEX)
            if step > 0:
                mask = mask & ((bits >> (32 - 8 * step)) == prefix)
            seen += tl.histogram(tl.where(mask, (bits >> (24 - 8 * step)) & 255, 256), 512)
        seen = tl.where(bins < 256, seen, 0)
        from_here_on = tl.sum(seen, 0) - tl.cumsum(seen, 0) + seen
        digit = tl.max(tl.where(from_here_on >= room, tl.where(bins < 256, bins, 0), 0), 0)
        room -= tl.sum(tl.where(bins > digit, seen, 0), 0)
        prefix = (prefix << 8) | digit
    each = 1.0
    if SIGNED:
        kept = tl.where(prefix > 0, count.to(tl.int32), tl.maximum(count.to(tl.int32) - room, 1))
        each = radius_of(scale, radii, field(table, n, ROW), True, RADII) / kept.to(tl.float64)
    ties = tl.zeros([], tl.int32)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        x = widened(tl.load(pointer + start + columns, mask=mask, other=0.0))
        bits = magnitude_bits(x, VERTEX)
        tied = ((bits == prefix) & mask).to(tl.int32)
        keep = (bits > prefix) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= room))
        ties += tl.sum(tied, 0)
        if SIGNED:
            sign = tl.where(x > 0, 1.0, 1.0 if VERTEX else 0.0) - tl.where(x < 0, 2.0 if VERTEX else 1.0, 0.0)
            x = tl.where(x == x, (sign * each + 0.0).to(tl.float32), x)
        tl.store(pointer + start + columns, rounded(tl.where(keep, x, 0.0), T), mask=mask)


@triton.jit
def heights(pointer, at, mask, other, SIMPLEX: tl.constexpr):
    """What a projection reduces: the entries of a datum (`SIMPLEX`) or their magnitudes; `other` beyond its end."""
    y = widened(tl.load(pointer + at, mask=mask, other=0.0)).to(tl.float64)
    y = y if SIMPLEX else tl.abs(y)
    return tl.where(mask, y, other)


@triton.jit
def measured_heights(pointer, length, BLOCK: tl.constexpr, SIMPLEX: tl.constexpr):
    """The sum, the largest and the least of the heights, how many are NaN, and how many infinite."""
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    tops = tl.full([BLOCK], float("-inf"), tl.float64)
    least = tl.full([BLOCK], float("inf"), tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    infinite = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        y = heights(pointer, start + columns, mask, 0.0, SIMPLEX)
        sums += y
        nans += (y != y).to(tl.int32)
        infinite += (y == float("inf")).to(tl.float64)
        tops = tl.maximum(tops, tl.where(mask, y, float("-inf")))
        least = tl.minimum(least, tl.where(mask, y, float("inf")))
    return tl.sum(sums, 0), tl.max(tops, 0), tl.min(least, 0), tl.sum(nans, 0), tl.sum(infinite, 0)


@triton.jit
def level_for(pointer, length, goal, top, BLOCK: tl.constexpr, SIMPLEX: tl.constexpr):
    """The level for which max(level - depth, 0), summed over a datum, is the goal.

    The depth of an entry is how far its height lies below the largest one, `top`. `excess` is that sum and `active` how
    many of its terms are positive, at `level`; `excess_2` and `active_2` are these at `middle`.
    """
    columns = tl.arange(0, BLOCK)
    low = goal / length.to(tl.float64)
    level = goal
    going = (goal > 0) & (top < float("inf"))
    passes = 0
    while going & (passes < PASSES):
        middle = tl.sqrt(low) * tl.sqrt(level)
        excess = tl.zeros([BLOCK], tl.float64)
        active = tl.zeros([BLOCK], tl.float64)
        excess_2 = tl.zeros([BLOCK], tl.float64)
        active_2 = tl.zeros([BLOCK], tl.float64)
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            depth = top - heights(pointer, start + columns, mask, float("-inf"), SIMPLEX)
            excess += tl.maximum(level - depth, 0.0)
            active += (depth < level).to(tl.float64)
            excess_2 += tl.maximum(middle - depth, 0.0)
            active_2 += (depth < middle).to(tl.float64)
        # the sum is convex in the level: a Newton step from above the solution stays above it
        error = tl.sum(excess, 0) - goal
        error_2 = tl.sum(excess_2, 0) - goal
        new = level - error / tl.maximum(tl.sum(active, 0), 1.0)
        new_2 = middle - error_2 / tl.maximum(tl.sum(active_2, 0), 1.0)
        is_high = error_2 >= 0
        low = tl.where(is_high, low, middle)
        new = tl.where(is_high, tl.minimum(new, new_2), new)
        going = (error > goal * NEAR) & (new < level)
        level = tl.where(new < level, new, level)
        passes += 1
    return level


@triton.jit
def l1_or_simplex(
    table, n: tl.int32, addresses, total: tl.float64, radii, slack: tl.float64, tiny: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SIMPLEX: tl.constexpr, RADII: tl.constexpr,
):  # fmt: skip
    """The nearest point of the L1 ball, or of the simplex: max(level - depth, 0), as `level_for` finds the level."""
    pointer, length = whole_datum(table, n, addresses, T, ALIGNED)
    goal = radius_of(total, radii, field(table, n, ROW), True, RADII)
    columns = tl.arange(0, BLOCK)
    found, top, least, nans, infinite = measured_heights(pointer, length, BLOCK, SIMPLEX)
    limit = goal * slack + 0.5 * length.to(tl.float64) * tiny
    if SIMPLEX:
        outside = (nans == 0) & ((least < 0) | ~(tl.abs(found - goal) <= limit))
    else:
        outside = (nans == 0) & (found > goal + limit)
    if outside:
        level = level_for(pointer, length, goal, top, BLOCK, SIMPLEX)
        share = goal / tl.maximum(infinite, 1.0)
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            x = widened(tl.load(pointer + start + columns, mask=mask, other=0.0))
            y = x.to(tl.float64)
            y = y if SIMPLEX else tl.abs(y)
            z = tl.maximum(level - (top - y), 0.0)
            z = tl.where(top == float("inf"), tl.where(y == float("inf"), share, 0.0), z)
            z = z if SIMPLEX else tl.where(x < 0, -z, z)
            tl.store(pointer + start + columns, rounded(z.to(tl.float32), T), mask=mask)
