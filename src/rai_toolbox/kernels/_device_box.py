"""A Triton kernel with one program for each datum: the nearest point of a ball, of order 1 or 2, and a box.

As in `_device_rows.py`, a program searches one number for its datum. In L1 the number is subtracted from the
magnitudes, in L2 the entries are multiplied by it; then they are clipped to the box.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from rai_toolbox.kernels._device_rows import NEAR, PASSES, whole_datum
from rai_toolbox.kernels._device_scaling import ROW, field, power, radius_of, root, rounded, widened


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
    """Entries times signs such that their results are ≥ 0, these signs, and the least and the largest result."""
    nearest = tl.minimum(tl.maximum(low, 0.0), high)
    sign = tl.where(nearest > 0, 1.0, tl.where(nearest < 0, -1.0, tl.where(x >= 0, 1.0, -1.0)))
    least = tl.abs(nearest)
    most = tl.maximum(tl.maximum(sign * low, sign * high), 0.0)
    return x * sign, sign, least, tl.minimum(most, tl.maximum(radius, least))


@triton.jit
def clipped(x, low, high):
    """x clipped to [low, high]; NaN stays NaN."""
    raised = tl.where(x < low, low, x)
    return tl.where(raised > high, high, raised)


@triton.jit
def tried(y, least, most, guess, offset, P: tl.constexpr):
    """The results at a guess, and which of them are free: no bound has changed them.

    A result is y less offset and guess (P 1), or y times the guess (P 2), clipped to its bounds.
    """
    if P == 1:
        moved = (y - offset) - guess
    else:
        moved = y * guess
    z = clipped(moved, least, most)
    return z, z == moved


@triton.jit
def middle_of(a, b):
    """The geometric mean of a and b where they differ by more than a factor of 4, else the arithmetic one.

    So a bracket over many decades takes few halvings.
    """
    small = tl.maximum(tl.minimum(tl.abs(a), tl.abs(b)), 1e-120)
    large = tl.maximum(tl.abs(a), tl.abs(b))
    geometric = tl.where(a + b < 0, -1.0, 1.0) * (tl.sqrt(small) * tl.sqrt(large))
    return tl.where((a * b >= 0) & (large > 4 * small), geometric, 0.5 * (a + b))


@triton.jit
def newtons(excess, free, held, squares, goal, guess, P: tl.constexpr):
    """Newton's next guess: the solution if the same entries stay free."""
    if P == 1:
        return guess + excess / tl.maximum(free, 1.0)
    else:
        return tl.sqrt(tl.maximum(goal * goal - held, 0.0) / tl.maximum(squares, 1e-300))


@triton.jit
def finite(y, spread, unit, P: tl.constexpr):
    """Finite entries in place of infinite ones, with the same nearest point.

    `spread`: infinite entries alone share the radius; each becomes `unit`, and the others 0.
    """
    is_inf = y == float("inf")
    shared = tl.where(is_inf, unit, 0.0)
    bounded = tl.where(is_inf, 1e300, tl.maximum(y, -1e300))
    return tl.where(spread, shared, bounded)


@triton.jit
def in_box(
    pointer, at, mask, row,
    lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride,
    T: tl.constexpr, LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """Entries of a datum, and the lower and upper bounds there; float64."""
    x = widened(tl.load(pointer + at, mask=mask, other=0.0)).to(tl.float64)
    low = bound_of(lows, low_number, row, at, mask, LOWS, low_row, low_stride, T)
    return x, low, bound_of(highs, high_number, row, at, mask, HIGHS, high_row, high_stride, T)


@triton.jit
def measured_in_box(
    pointer, length, row, goal,
    lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """Return four numbers of a datum, which decide whether it moves, and how far at most.

    Its norm once it is clipped to the box, NaN if it has one; the sum of `power` where infinite entries get their
    largest result, and the others their least; how many are infinite; the largest finite entry, times its sign as
    `folded` gives it.
    """
    columns = tl.arange(0, BLOCK)
    norms = tl.zeros([BLOCK], tl.float64)
    ends = tl.zeros([BLOCK], tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    tops = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        at = start + columns
        mask = at < length
        x, low, high = in_box(
            pointer, at, mask, row,
            lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, LOWS, HIGHS,
        )  # fmt: skip
        z = tl.where(mask, clipped(x, low, high), 0.0)
        y, _, least, most = folded(x, low, high, goal)
        is_inf = mask & (y == float("inf"))
        bound = tl.where(mask, tl.where(is_inf, most, least), 0.0)
        norms += power(z, P)
        ends += power(bound, P)
        infinite += is_inf.to(tl.int32)
        tops = tl.maximum(tops, tl.where(mask & (is_inf == 0), y, 0.0))
    return root(tl.sum(norms, 0), P), tl.sum(ends, 0), tl.sum(infinite, 0), tl.max(tops, 0)


@triton.jit
def added(sums, free, held, squares, z, is_free, y, P: tl.constexpr):
    """Add more entries to the sums at a guess: of all results; how many are free; of held results; of free entries."""
    if P == 1:
        return sums + z, free + is_free.to(tl.float64), held, squares
    else:
        return (
            sums + z * z, free,
            held + tl.where(is_free, 0.0, z * z), squares + tl.where(is_free, y * y, 0.0),
        )  # fmt: skip


@triton.jit
def tried_twice(
    pointer, length, row, goal, guess, middle, offset, spread, unit,
    lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """By how much the sum at each of two guesses is above the goal (P 1) or below it (P 2), and the next guesses."""
    columns = tl.arange(0, BLOCK)
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
        x, low, high = in_box(
            pointer, at, mask, row,
            lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, LOWS, HIGHS,
        )  # fmt: skip
        y, _, least, most = folded(x, low, high, goal)
        y = finite(y, spread, unit, P)
        z, is_free = tried(y, least, most, guess, offset, P)
        z = tl.where(mask, z, 0.0)
        sums, free, held, squares = added(sums, free, held, squares, z, is_free & mask, y, P)
        z, is_free = tried(y, least, most, middle, offset, P)
        z = tl.where(mask, z, 0.0)
        sums_2, free_2, held_2, squares_2 = added(sums_2, free_2, held_2, squares_2, z, is_free & mask, y, P)
    target = power(goal, P)
    excess = tl.sum(sums, 0) - target if P == 1 else target - tl.sum(sums, 0)
    excess_2 = tl.sum(sums_2, 0) - target if P == 1 else target - tl.sum(sums_2, 0)
    new = newtons(excess, tl.sum(free, 0), tl.sum(held, 0), tl.sum(squares, 0), goal, guess, P)
    new_2 = newtons(excess_2, tl.sum(free_2, 0), tl.sum(held_2, 0), tl.sum(squares_2, 0), goal, middle, P)
    return excess, excess_2, new, new_2


@triton.jit
def unknown_of(
    pointer, length, row, goal, guess, high_end, going, spread, unit,
    lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """The number that meets the radius, and its offset: both are subtracted (P 1), or the number multiplies (P 2)."""
    low_end = tl.zeros([], tl.float64)
    best = high_end
    offset = tl.zeros([], tl.float64)
    best_offset = offset
    error = tl.full([], float("inf"), tl.float64)
    passes = 0
    while going & (passes < PASSES):
        middle = middle_of(low_end, high_end)
        excess, excess_2, next_1, next_2 = tried_twice(
            pointer, length, row, goal, guess, middle, offset, spread, unit,
            lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, BLOCK, P, LOWS, HIGHS,
        )  # fmt: skip
        low_end = tl.where(excess > 0, tl.maximum(low_end, guess), low_end)
        high_end = tl.where(excess > 0, high_end, tl.minimum(high_end, guess))
        low_end = tl.where(excess_2 > 0, tl.maximum(low_end, middle), low_end)
        high_end = tl.where(excess_2 > 0, high_end, tl.minimum(high_end, middle))
        second = tl.abs(excess_2) < tl.abs(excess)
        here = tl.where(second, middle, guess)
        miss = tl.minimum(tl.abs(excess), tl.abs(excess_2)) / power(goal, P)
        new = tl.where(second, next_2, next_1)
        best = tl.where(miss < error, here, best)
        best_offset = tl.where(miss < error, offset, best_offset)
        error = tl.minimum(error, miss)
        # The ends of the bracket are neighbours in float64. If the sum is still off (P 1), search the difference from
        # the upper end, which becomes the offset: that has more digits.
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
    return best, best_offset


@triton.jit
def nearest_in_box(
    table, n: tl.int32, addresses, radius: tl.float64, radii, slack: tl.float64, tiny: tl.float64,
    lows, low_number: tl.float64, low_row: tl.int64, low_stride: tl.int64,
    highs, high_number: tl.float64, high_row: tl.int64, high_stride: tl.int64,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr, RADII: tl.constexpr,
    LOWS: tl.constexpr, HIGHS: tl.constexpr,
):  # fmt: skip
    """The nearest point of a ball, P 1 or 2, and a box."""
    pointer, length = whole_datum(table, n, addresses, T, ALIGNED)
    row = field(table, n, ROW)
    goal = radius_of(radius, radii, row, True, RADII)
    norm, ends, infinite, top = measured_in_box(
        pointer, length, row, goal,
        lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, BLOCK, P, LOWS, HIGHS,
    )  # fmt: skip
    outside = norm > goal * (1 + slack) + 0.5 * root(length.to(tl.float64), P) * tiny  # False for a NaN
    spread = (infinite > 0) & (ends > power(goal, P))
    unit = goal if P == 1 else 1.0
    high_end = tl.where(spread, goal, top if P == 1 else 1.0)
    guess = tl.zeros([], tl.float64) if P == 1 else tl.minimum(goal / tl.maximum(norm, 1e-300), high_end)
    best, offset = unknown_of(
        pointer, length, row, goal, guess, high_end, outside & (goal > 0), spread, unit,
        lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, BLOCK, P, LOWS, HIGHS,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        at = start + columns
        mask = at < length
        x, low, high = in_box(
            pointer, at, mask, row,
            lows, low_number, low_row, low_stride, highs, high_number, high_row, high_stride, T, LOWS, HIGHS,
        )  # fmt: skip
        z = clipped(x, low, high)
        y, sign, least, most = folded(x, low, high, goal)
        moved, _ = tried(finite(y, spread, unit, P), least, most, best, offset, P)
        z = tl.where(outside, moved * sign, z)
        tl.store(pointer + at, rounded(z.to(tl.float32), T), mask=mask)
