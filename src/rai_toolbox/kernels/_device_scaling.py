"""Triton kernels: norms of data, and a gradient's change, the SGD update and a parameter's change in one pass.

A table says what each program works on, one column per program; rows of it are the fields below. Addresses of tensors
are in a table of their own, since they may change from step to step.

Sums are float64: the square of any float32 neither overflows nor underflows there, so nothing is rescaled.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import os

import triton
import triton.language as tl

# Triton's interpreter does not convert bfloat16 as a GPU does: it truncates, and has no subnormal numbers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Fields of the table.
TENSOR, OFFSET, COUNT, LENGTH, FIRST, PARTS, ROW = (tl.constexpr(i) for i in range(7))

# How an entry is changed. The numbers are those of `_changes.Kind`.
NOTHING, NORMALIZE, BALL, SIGN, CLAMP = (tl.constexpr(i) for i in range(5))


@triton.jit
def field(table, n, which: tl.constexpr):
    """An entry of this program's column of the table."""
    return tl.load(table + which * n + tl.program_id(0))


@triton.jit
def widened(x):
    """x as float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, T: tl.constexpr):
    """The nearest number of dtype T to a float32, an even one if there are two."""
    if INTERPRETED and tl.bfloat16 == T:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
        nan = tl.zeros_like(near) + 0x7FC0
        return tl.where(x == x, near, nan).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(T)


@triton.jit
def number(x):
    """x as a float64 of Triton: the interpreter passes a Python number."""
    return tl.zeros([], tl.float64) + x


@triton.jit
def address(addresses, i, T: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from a table of addresses."""
    pointer = tl.load(addresses + i).to(tl.pointer_type(T))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def eights(x):
    """x, which is a multiple of 8, written so that the compiler knows it."""
    return x // 8 * 8


@triton.jit
def power(x, P: tl.constexpr):
    """The term of an entry in the sum of a norm: its square (P 2), or its magnitude (P 1)."""
    if P == 2:
        return x * x
    else:
        return tl.abs(x)


@triton.jit
def root(total, P: tl.constexpr):
    """The norm, from the sum of `power`."""
    if P == 2:
        return tl.sqrt(total)
    else:
        return total


@triton.jit
def is_infinite(x):
    """1 where x is infinite."""
    return (tl.abs(x) == float("inf")).to(tl.float64)


@triton.jit
def radius_of(radius, radii, row, mask, RADII: tl.constexpr):
    """The bound of the factor of a row: `radius` if RADII is negative, else an entry of `radii`.

    RADII is then its stride: 1 for an entry per datum, 0 for one entry, on the device.
    """
    if RADII < 0:
        return number(radius)
    else:
        return tl.load(radii + row * RADII, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def factor_of(norm, length, bound, factor_scale, slack, tiny, P: tl.constexpr, KIND: tl.constexpr):
    """The factor of a datum with this norm; see `NormFactor`."""
    if KIND == NORMALIZE:
        return factor_scale / tl.maximum(norm, tl.maximum(bound, 1e-300))
    else:
        room = length.to(tl.float64)
        limit = bound * (1 + slack) + 0.5 * root(room, P) * tiny
        return tl.where(norm > limit, factor_scale * (bound / norm), factor_scale)


@triton.jit
def changed(x, factor, norm, infinite, bound, low, high, scale, bias, KIND: tl.constexpr, SHIFT: tl.constexpr):
    """A tile after the change `KIND` and, with `SHIFT`, a scale and a bias; float32."""
    if KIND == NORMALIZE or KIND == BALL:
        y = x.to(tl.float64) * factor
        if KIND == BALL:
            # of a datum with infinite entries these get equal magnitudes, the others 0: the limit if all grow alike
            shared = tl.where(x > 0, 1.0, -1.0) * (bound / tl.sqrt(tl.maximum(infinite, 1.0)))
            shared = tl.where(tl.abs(x) == float("inf"), shared, 0.0)
            y = tl.where(norm == float("inf"), shared, y)
        if SHIFT:
            y = y * scale + bias
        return y.to(tl.float32)
    y = x
    if KIND == SIGN:
        y = tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
    if KIND == CLAMP:
        low = number(low).to(tl.float32)
        high = number(high).to(tl.float32)
        y = tl.where(x > high, high, tl.where(x < low, low, x))
    if SHIFT:
        y = (y.to(tl.float64) * scale + bias).to(tl.float32)
    return y


@triton.jit
def updated(p, g, keep, lr, SHRINK: tl.constexpr):
    """keep·p - lr·g; without `SHRINK`, `keep` is 1. With a `keep` of 0 an infinite p counts as 0."""
    if SHRINK:
        p = tl.where(number(keep) == 0, 0.0, number(keep).to(tl.float32) * p)
    return p - number(lr).to(tl.float32) * g


@triton.jit
def step_rows(
    table, n: tl.int32, g_addresses, p_addresses, keep: tl.float64, lr: tl.float64,
    bound: tl.float64, factor_scale: tl.float64, g_low: tl.float64, g_high: tl.float64,
    scale: tl.float64, bias: tl.float64,
    radius: tl.float64, radii, p_low: tl.float64, p_high: tl.float64, slack: tl.float64, tiny: tl.float64,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, UPDATE: tl.constexpr, SHRINK: tl.constexpr,
    AFTER: tl.constexpr, RADII: tl.constexpr,
):  # fmt: skip
    """For data that fit a tile: change gradients, update parameters, change these. Each is read and written once."""
    tensor = field(table, n, TENSOR)
    offset = field(table, n, OFFSET)
    count = field(table, n, COUNT)
    length = field(table, n, LENGTH)
    if ALIGNED:
        offset = eights(offset)
        length = eights(length)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < count) & (columns < length)
    places = offset + rows * length + columns
    g_pointers = address(g_addresses, tensor, T, ALIGNED) + places
    g = widened(tl.load(g_pointers, mask=mask, other=0.0))
    row = field(table, n, ROW) + rows
    if KIND == NORMALIZE or KIND == BALL:
        wide = g.to(tl.float64)
        norm = root(tl.sum(power(wide, P), 1, keep_dims=True), P)
        if KIND == BALL:
            limit = radius_of(bound, radii, row, rows < count, RADII)
            infinite = tl.sum(is_infinite(g), 1, keep_dims=True)
        else:
            limit = number(bound)
            infinite = norm
        factor = factor_of(norm, length, limit, factor_scale, slack, tiny, P, KIND)
        g = changed(g, factor, norm, infinite, limit, g_low, g_high, scale, bias, KIND, SHIFT)
    else:
        g = changed(g, 1.0, 1.0, 1.0, 1.0, g_low, g_high, scale, bias, KIND, SHIFT)
    g_rounded = rounded(g, T)
    if KIND != NOTHING or SHIFT:
        tl.store(g_pointers, g_rounded, mask=mask)
    if UPDATE:
        p_pointers = address(p_addresses, tensor, T, ALIGNED) + places
        p = widened(tl.load(p_pointers, mask=mask, other=0.0))
        p = widened(rounded(updated(p, widened(g_rounded), keep, lr, SHRINK), T))
        if AFTER == BALL:
            wide = tl.where(mask, p, 0.0).to(tl.float64)
            norm = tl.sqrt(tl.sum(wide * wide, 1, keep_dims=True))
            infinite = tl.sum(tl.where(mask, is_infinite(p), 0.0), 1, keep_dims=True)
            limit = radius_of(radius, radii, row, rows < count, RADII)
            factor = factor_of(norm, length, limit, 1.0, slack, tiny, 2, BALL)
            p = changed(p, factor, norm, infinite, limit, p_low, p_high, 1.0, 0.0, BALL, False)
        else:
            p = changed(p, 1.0, 1.0, 1.0, 1.0, p_low, p_high, 1.0, 0.0, AFTER, False)
        tl.store(p_pointers, rounded(p, T), mask=mask)


@triton.jit
def sums_of_parts(
    table, n: tl.int32, addresses, parts, n_parts: tl.int32,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store, for a part of a datum, the sum of `power` over its entries, and how many of them are infinite."""
    tensor = field(table, n, TENSOR)
    offset = field(table, n, OFFSET)
    count = field(table, n, COUNT)
    if ALIGNED:
        offset = eights(offset)
        count = eights(count)
    pointer = address(addresses, tensor, T, ALIGNED) + offset
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    infinite = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        x = widened(tl.load(pointer + start + columns, mask=start + columns < count, other=0.0))
        total += power(x.to(tl.float64), P)
        infinite += is_infinite(x)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))
    tl.store(parts + n_parts + tl.program_id(0), tl.sum(infinite, 0))


@triton.jit
def added_up(parts, first, count):
    """The sum of `count` numbers in memory from `first` on, always in the same order."""
    columns = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    for start in range(0, count, 256):
        total += tl.load(parts + first + start + columns, mask=start + columns < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def step_parts(
    table, n: tl.int32, g_addresses, p_addresses, g_parts, p_parts, n_parts: tl.int32, keep: tl.float64, lr: tl.float64,
    bound: tl.float64, factor_scale: tl.float64, g_low: tl.float64, g_high: tl.float64,
    scale: tl.float64, bias: tl.float64,
    radii, p_low: tl.float64, p_high: tl.float64, slack: tl.float64, tiny: tl.float64,
    T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, UPDATE: tl.constexpr, SHRINK: tl.constexpr,
    AFTER: tl.constexpr, MEASURE: tl.constexpr, RADII: tl.constexpr,
):  # fmt: skip
    """For a part of a datum: change the gradient by the norm of the whole datum, update the parameter, and change this.

    `MEASURE`: store of the parameter what `sums_of_parts` stores, for a projection that follows.
    """
    tensor = field(table, n, TENSOR)
    offset = field(table, n, OFFSET)
    count = field(table, n, COUNT)
    if ALIGNED:
        offset = eights(offset)
        count = eights(count)
    g_pointer = address(g_addresses, tensor, T, ALIGNED) + offset
    if UPDATE:
        p_pointer = address(p_addresses, tensor, T, ALIGNED) + offset
    norm = number(0.0)
    infinite = number(0.0)
    factor = number(1.0)
    limit = number(bound)
    if KIND == NORMALIZE or KIND == BALL:
        first = field(table, n, FIRST)
        parts = field(table, n, PARTS)
        norm = root(added_up(g_parts, first, parts), P)
        if KIND == BALL:
            limit = radius_of(bound, radii, field(table, n, ROW), True, RADII)
            infinite = added_up(g_parts + n_parts, first, parts)
        factor = factor_of(norm, field(table, n, LENGTH), limit, factor_scale, slack, tiny, P, KIND)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    p_infinite = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        mask = start + columns < count
        g = widened(tl.load(g_pointer + start + columns, mask=mask, other=0.0))
        g = changed(g, factor, norm, infinite, limit, g_low, g_high, scale, bias, KIND, SHIFT)
        g_rounded = rounded(g, T)
        if KIND != NOTHING or SHIFT:
            tl.store(g_pointer + start + columns, g_rounded, mask=mask)
        if UPDATE:
            p = widened(tl.load(p_pointer + start + columns, mask=mask, other=0.0))
            p = widened(rounded(updated(p, widened(g_rounded), keep, lr, SHRINK), T))
            p = changed(p, 1.0, 1.0, 1.0, 1.0, p_low, p_high, 1.0, 0.0, AFTER, False)
            tl.store(p_pointer + start + columns, rounded(p, T), mask=mask)
            if MEASURE:
                p = tl.where(mask, p, 0.0)
                total += p.to(tl.float64) * p.to(tl.float64)
                p_infinite += is_infinite(p)
    if MEASURE:
        tl.store(p_parts + tl.program_id(0), tl.sum(total, 0))
        tl.store(p_parts + n_parts + tl.program_id(0), tl.sum(p_infinite, 0))
