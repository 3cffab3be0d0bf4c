"""Triton kernels with one program for each datum: the largest entries, and nearest points of balls and of boxes.

A program reads its datum several times; after the first, from the cache of the device. What a projection looks for is
one number per datum: it is bracketed, and a pass over the datum tries two guesses, Newton's and the middle of the
bracket, so that there are few passes when things go well and never many.
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

# How near a sum has to come to the radius, in units of it: a float32 has no more than 2^-24.
NEAR = tl.constexpr(2.0**-42)
# Of a bracket: by then it is a point.
PASSES = tl.constexpr(140)


@triton.jit
def magnitude_bits(x):
    """|x| as an integer of the same order; NaN is as infinity."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800000)


@triton.jit
def keep_largest(
    table, n: tl.int32, addresses, scale: tl.float64, radii, counts,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SIGNED: tl.constexpr, RADII: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """Zero all but the `count` entries of largest magnitude, the first among equals.

    `SIGNED`: these become their signs, divided by how many of them are not zero, times the scale.
    """
    length = field(table, n, LENGTH)
    count = field(table, n, COUNT)
    if COUNTS:
        count = tl.minimum(tl.load(counts + field(table, n, ROW)), length)
    if ALIGNED:
        length = eights(length)
    offset = field(table, n, OFFSET)
    if ALIGNED:
        offset = eights(offset)
    pointer = address(addresses, field(table, n, TENSOR), T, ALIGNED) + offset
    columns = tl.arange(0, BLOCK)
    bins = tl.arange(0, 512)
    # The bits of the threshold, eight at a time: how often does each value occur among those that agree so far?
    prefix = tl.zeros([], tl.int32)
    room = count.to(tl.int32)
    for step in tl.static_range(4):
        seen = tl.zeros([512], tl.int32)
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            bits = magnitude_bits(widened(tl.load(pointer + start + columns, mask=mask, other=0.0)))
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
        bits = magnitude_bits(x)
        tied = ((bits == prefix) & mask).to(tl.int32)
        keep = (bits > prefix) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= room))
        ties += tl.sum(tied, 0)
        if SIGNED:
            sign = tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
            x = tl.where(x == x, (sign * each + 0.0).to(tl.float32), x)
        tl.store(pointer + start + columns, rounded(tl.where(keep, x, 0.0), T), mask=mask)


@triton.jit
def l1_or_simplex(
    table, n: tl.int32, addresses, total: tl.float64, radii, slack: tl.float64, tiny: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SIMPLEX: tl.constexpr, RADII: tl.constexpr,
):  # fmt: skip
    """The nearest point of the L1 ball, or of the simplex: max(level - depth, 0), depth counted from the largest."""
    length = field(table, n, LENGTH)
    if ALIGNED:
        length = eights(length)
    offset = field(table, n, OFFSET)
    if ALIGNED:
        offset = eights(offset)
    pointer = address(addresses, field(table, n, TENSOR), T, ALIGNED) + offset
    goal = radius_of(total, radii, field(table, n, ROW), True, RADII)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    tops = tl.full([BLOCK], float("-inf"), tl.float64)
    least = tl.full([BLOCK], float("inf"), tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    infinite = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        y = widened(tl.load(pointer + start + columns, mask=mask, other=0.0)).to(tl.float64)
        y = y if SIMPLEX else tl.abs(y)
        sums += y
        nans += (y != y).to(tl.int32)
        infinite += (y == float("inf")).to(tl.float64)
        tops = tl.maximum(tops, tl.where(mask, y, float("-inf")))
        least = tl.minimum(least, tl.where(mask, y, float("inf")))
    found = tl.sum(sums, 0)
    top = tl.max(tops, 0)
    shares = tl.maximum(tl.sum(infinite, 0), 1.0)
    limit = goal * slack + 0.5 * length.to(tl.float64) * tiny
    outside = tl.sum(nans, 0) == 0
    if SIMPLEX:
        outside = outside & ((tl.min(least, 0) < 0) | ~(tl.abs(found - goal) <= limit))
    else:
        outside = outside & (found > goal + limit)
    if outside:
        low = goal / length.to(tl.float64)
        level = goal
        endless = top == float("inf")
        going = (goal > 0) & (endless == 0)
        passes = 0
        while going & (passes < PASSES):
            middle = tl.sqrt(low) * tl.sqrt(level)
            water = tl.zeros([BLOCK], tl.float64)
            wet = tl.zeros([BLOCK], tl.float64)
            water_2 = tl.zeros([BLOCK], tl.float64)
            wet_2 = tl.zeros([BLOCK], tl.float64)
            for start in range(0, length, BLOCK):
                mask = start + columns < length
                y = widened(tl.load(pointer + start + columns, mask=mask, other=float("-inf"))).to(tl.float64)
                y = y if SIMPLEX else tl.where(mask, tl.abs(y), float("-inf"))
                depth = top - y
                water += tl.maximum(level - depth, 0.0)
                wet += (depth < level).to(tl.float64)
                water_2 += tl.maximum(middle - depth, 0.0)
                wet_2 += (depth < middle).to(tl.float64)
            # the sum is convex: a step of Newton's from above stays above
            error = tl.sum(water, 0) - goal
            error_2 = tl.sum(water_2, 0) - goal
            new = level - error / tl.maximum(tl.sum(wet, 0), 1.0)
            new_2 = middle - error_2 / tl.maximum(tl.sum(wet_2, 0), 1.0)
            is_high = error_2 >= 0
            low = tl.where(is_high, low, middle)
            new = tl.where(is_high, tl.minimum(new, new_2), new)
            going = (error > goal * NEAR) & (new < level)
            level = tl.where(new < level, new, level)
            passes += 1
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            x = widened(tl.load(pointer + start + columns, mask=mask, other=0.0))
            y = x.to(tl.float64)
            y = y if SIMPLEX else tl.abs(y)
            z = tl.maximum(level - (top - y), 0.0)
            z = tl.where(endless, tl.where(y == float("inf"), goal / shares, 0.0), z)
            z = z if SIMPLEX else tl.where(x < 0, -z, z)
            tl.store(pointer + start + columns, rounded(z.to(tl.float32), T), mask=mask)


@triton.jit
def bound_of(bounds, number, row, columns, mask, STRIDES: tl.constexpr, row_stride, stride, T: tl.constexpr):
    """A side of the box at some entries of a datum, rounded to the dtype of the data; float64."""
    if STRIDES:
        bound = tl.load(bounds + row * row_stride + columns * stride, mask=mask, other=0.0)
        return widened(rounded(widened(bound), T)).to(tl.float64)
    else:
        return tl.zeros_like(columns).to(tl.float64) + number


@triton.jit
def folded(x, low, high, radius):
    """Entries turned to be ≥ 0 where the box lets them, their signs, and the interval for their magnitudes."""
    nearest = tl.minimum(tl.maximum(low, 0.0), high)
    sign = tl.where(nearest > 0, 1.0, tl.where(nearest < 0, -1.0, tl.where(x >= 0, 1.0, -1.0)))
    least = tl.abs(nearest)
    most = tl.maximum(tl.maximum(sign * low, sign * high), 0.0)
    return x * sign, sign, least, tl.minimum(most, tl.maximum(radius, least))


@triton.jit
def clipped(x, low, high):
    """x between low and high; NaN stays."""
    raised = tl.where(x < low, low, x)
    return tl.where(raised > high, high, raised)


@triton.jit
def tried(y, least, most, guess, offset, P: tl.constexpr):
    """At a guess: the entries (what is left of them, P 1, or multiplied, P 2), and which of them are free."""
    if P == 1:
        moved = (y - offset) - guess
    else:
        moved = y * guess
    z = clipped(moved, least, most)
    return z, z == moved


@triton.jit
def middle_of(a, b):
    """Between a and b: by exponent while these differ, so that many decades take few halvings."""
    small = tl.maximum(tl.minimum(tl.abs(a), tl.abs(b)), 1e-120)
    large = tl.maximum(tl.abs(a), tl.abs(b))
    geometric = tl.where(a + b < 0, -1.0, 1.0) * (tl.sqrt(small) * tl.sqrt(large))
    return tl.where((a * b >= 0) & (large > 4 * small), geometric, 0.5 * (a + b))


@triton.jit
def newtons(excess, free, held, squares, goal, guess, P: tl.constexpr):
    """The next guess, as if what is free stayed free."""
    if P == 1:
        return guess + excess / tl.maximum(free, 1.0)
    else:
        return tl.sqrt(tl.maximum(goal * goal - held, 0.0) / tl.maximum(squares, 1e-300))


@triton.jit
def finite(y, spread, unit, P: tl.constexpr):
    """Finite entries with the same nearest point; `spread`: only infinite ones are, and share the radius."""
    endless = y == float("inf")
    shared = tl.where(endless, unit, 0.0)
    bounded = tl.where(endless, 1e300, tl.maximum(y, -1e300))
    return tl.where(spread, shared, bounded)


@triton.jit
def nearest_in_box(
    table, n: tl.int32, addresses, radius: tl.float64, radii, slack: tl.float64, tiny: tl.float64,
    lows, low_number: tl.float64, low_row: tl.int64, low_stride: tl.int64,
    highs, high_number: tl.float64, high_row: tl.int64, high_stride: tl.int64,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr, RADII: tl.constexpr,
    LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """The nearest point of a ball, P 1 or 2, and a box."""
    length = field(table, n, LENGTH)
    if ALIGNED:
        length = eights(length)
    row = field(table, n, ROW)
    offset = field(table, n, OFFSET)
    if ALIGNED:
        offset = eights(offset)
    pointer = address(addresses, field(table, n, TENSOR), T, ALIGNED) + offset
    goal = radius_of(radius, radii, row, True, RADII)
    columns = tl.arange(0, BLOCK)
    norms = tl.zeros([BLOCK], tl.float64)
    ends = tl.zeros([BLOCK], tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    infinite = tl.zeros([BLOCK], tl.int32)
    tops = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        at = start + columns
        mask = at < length
        x = widened(tl.load(pointer + at, mask=mask, other=0.0)).to(tl.float64)
        low = bound_of(lows, low_number, row, at, mask, LOWS, low_row, low_stride, T)
        high = bound_of(highs, high_number, row, at, mask, HIGHS, high_row, high_stride, T)
        z = tl.where(mask, clipped(x, low, high), 0.0)
        y, sign, least, most = folded(x, low, high, goal)
        endless = mask & (y == float("inf"))
        bound = tl.where(mask, tl.where(endless, most, least), 0.0)
        norms += z * z if P == 2 else tl.abs(z)
        ends += bound * bound if P == 2 else bound
        nans += (mask & (z != z)).to(tl.int32)
        infinite += endless.to(tl.int32)
        tops = tl.maximum(tops, tl.where(mask & (endless == 0), y, 0.0))
    norm = tl.sqrt(tl.sum(norms, 0)) if P == 2 else tl.sum(norms, 0)
    room = length.to(tl.float64)
    limit = goal * (1 + slack) + 0.5 * (tl.sqrt(room) if P == 2 else room) * tiny
    outside = (norm > limit) & (tl.sum(nans, 0) == 0)
    target = goal * goal if P == 2 else goal
    spread = (tl.sum(infinite, 0) > 0) & (tl.sum(ends, 0) > target)
    unit = goal if P == 1 else 1.0
    low_end = tl.zeros([], tl.float64)
    high_end = tl.max(tops, 0)
    if P == 2:
        high_end = tl.where(spread, goal, 1.0)
    else:
        high_end = tl.where(spread, goal, high_end)
    best = high_end
    offset = tl.zeros([], tl.float64)
    best_offset = offset
    error = tl.full([], float("inf"), tl.float64)
    guess = low_end if P == 1 else tl.minimum(goal / tl.maximum(norm, 1e-300), high_end)
    going = outside & (goal > 0)
    passes = 0
    while going & (passes < PASSES):
        middle = middle_of(low_end, high_end)
        sums = tl.zeros([BLOCK], tl.float64)
        free = tl.zeros([BLOCK], tl.float64)
        held = tl.zeros([BLOCK], tl.float64)
        squares = tl.zeros([BLOCK], tl.float64)
        sums_2 = tl.zeros([BLOCK], tl.float64)
        free_2 = tl.zeros([BLOCK], tl.float64)
        held_2 = tl.zeros([BLOCK], tl.float64)
        squares_2 = tl.zeros([BLOCK], tl.float64)
        for start in range(0, length, BLOCK):
            at = start + columns
            mask = at < length
            x = widened(tl.load(pointer + at, mask=mask, other=0.0)).to(tl.float64)
            low = bound_of(lows, low_number, row, at, mask, LOWS, low_row, low_stride, T)
            high = bound_of(highs, high_number, row, at, mask, HIGHS, high_row, high_stride, T)
            y, sign, least, most = folded(x, low, high, goal)
            y = finite(y, spread, unit, P)
            z, is_free = tried(y, least, most, guess, offset, P)
            z_2, is_free_2 = tried(y, least, most, middle, offset, P)
            is_free = is_free & mask
            is_free_2 = is_free_2 & mask
            z = tl.where(mask, z, 0.0)
            z_2 = tl.where(mask, z_2, 0.0)
            if P == 1:
                sums += z
                sums_2 += z_2
                free += is_free.to(tl.float64)
                free_2 += is_free_2.to(tl.float64)
            else:
                sums += z * z
                sums_2 += z_2 * z_2
                held += tl.where(is_free, 0.0, z * z)
                held_2 += tl.where(is_free_2, 0.0, z_2 * z_2)
                squares += tl.where(is_free, y * y, 0.0)
                squares_2 += tl.where(is_free_2, y * y, 0.0)
        excess = tl.sum(sums, 0) - target if P == 1 else target - tl.sum(sums, 0)
        excess_2 = tl.sum(sums_2, 0) - target if P == 1 else target - tl.sum(sums_2, 0)
        low_end = tl.where(excess > 0, tl.maximum(low_end, guess), low_end)
        high_end = tl.where(excess > 0, high_end, tl.minimum(high_end, guess))
        low_end = tl.where(excess_2 > 0, tl.maximum(low_end, middle), low_end)
        high_end = tl.where(excess_2 > 0, high_end, tl.minimum(high_end, middle))
        next_1 = newtons(excess, tl.sum(free, 0), tl.sum(held, 0), tl.sum(squares, 0), goal, guess, P)
        next_2 = newtons(excess_2, tl.sum(free_2, 0), tl.sum(held_2, 0), tl.sum(squares_2, 0), goal, middle, P)
        second = tl.abs(excess_2) < tl.abs(excess)
        here = tl.where(second, middle, guess)
        miss = tl.minimum(tl.abs(excess), tl.abs(excess_2)) / target
        new = tl.where(second, next_2, next_1)
        best = tl.where(miss < error, here, best)
        best_offset = tl.where(miss < error, offset, best_offset)
        error = tl.minimum(error, miss)
        # A bracket of neighbours: a sum that is still off wants more digits than its end has. Count from there.
        closed = high_end - low_end <= 2.3e-16 * tl.maximum(tl.abs(low_end), tl.abs(high_end))
        if P == 1:
            again = closed & (offset == 0) & (high_end > 0)
            going = (error > NEAR) & (again | (closed == 0))
            low_end_2 = low_end - high_end - 1e-15 * tl.abs(high_end)
            offset = tl.where(again, high_end, offset)
            low_end = tl.where(again, low_end_2, low_end)
            high_end = tl.where(again, 0.0, high_end)
            new = tl.where(again, middle_of(low_end, high_end), new)
        else:
            going = (error > NEAR) & (closed == 0)
        guess = tl.where((new > low_end) & (new < high_end), new, middle_of(low_end, middle_of(low_end, high_end)))
        passes += 1
    for start in range(0, length, BLOCK):
        at = start + columns
        mask = at < length
        x = widened(tl.load(pointer + at, mask=mask, other=0.0)).to(tl.float64)
        low = bound_of(lows, low_number, row, at, mask, LOWS, low_row, low_stride, T)
        high = bound_of(highs, high_number, row, at, mask, HIGHS, high_row, high_stride, T)
        z = clipped(x, low, high)
        y, sign, least, most = folded(x, low, high, goal)
        moved, is_free = tried(finite(y, spread, unit, P), least, most, best, best_offset, P)
        z = tl.where(outside, moved * sign, z)
        tl.store(pointer + at, rounded(z.to(tl.float32), T), mask=mask)
