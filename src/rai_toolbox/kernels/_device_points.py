"""Triton kernels for points around data, one row of a matrix each: distances, stored points, gradients made usable.

Every matrix is contiguous, except that bounds may be broadcast, with a stride of 0. A program works on one row.
"""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from rai_toolbox.kernels._device_scaling import rounded, widened

# The constants of SplitMix64, as integers with a sign.
GAMMA = tl.constexpr(-7046029254386353131)
MIX_1 = tl.constexpr(-4658895280553007687)
MIX_2 = tl.constexpr(-7723592293110705685)


@triton.jit
def mixed(x):
    """The finalizer of SplitMix64: see `_hashing.mixed`. A right shift copies the sign, so the copies are masked."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def random_bits(start, columns):
    """As `_hashing.bits`, from the mixed key and draw."""
    return mixed(start + (columns.to(tl.int64) + 1) * GAMMA)


@triton.jit
def normals(bits):
    """As `_hashing.normals`."""
    total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + ((bits >> 48) & 0xFFFF)
    return (total.to(tl.float64) + 2.0 - 131072.0) * (1.7320508075688772 / 65536.0)


@triton.jit
def difference(x, base):
    """x - base; 0 where they are equal, also where both are infinite."""
    return tl.where(x == base, 0.0, x - base)


@triton.jit
def row_distances(
    length: tl.int32, points, data, result,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The norms of the rows of points - data, float64. P: 1, 2; 0 for how many differ; -1 for the largest."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * length
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        x = widened(tl.load(points + offset + start + columns, mask=mask, other=0.0)).to(tl.float64)
        base = widened(tl.load(data + offset + start + columns, mask=mask, other=0.0)).to(tl.float64)
        d = difference(x, base)
        if P == 2:
            sums += d * d
        elif P == 1:
            sums += tl.abs(d)
        elif P == 0:
            sums += (d != 0).to(tl.float64)
        else:
            sums = tl.where((tl.abs(d) > sums) | (d != d), tl.abs(d), sums)
    if P < 0:
        nan = tl.sum((sums != sums).to(tl.float64), 0)
        norm = tl.where(nan > 0, float("nan"), tl.max(sums, 0))
    else:
        norm = tl.sum(sums, 0)
    if P == 2:
        norm = tl.sqrt(norm)
    tl.store(result + row, norm)


@triton.jit
def neighbor(bits, upward):
    """From the bits of a float, those of the next larger number (`upward`) or the next smaller one."""
    magnitude = bits & (0x7FFFFFFF if bits.dtype == tl.int32 else 0x7FFF)
    away = (bits >= 0) == upward
    least = tl.where(upward, tl.zeros_like(bits) + 1, tl.zeros_like(bits) + 1 - magnitude)
    sign = tl.full([1], -2147483648, tl.int32) if bits.dtype == tl.int32 else tl.full([1], -32768, tl.int16)
    least = tl.where(upward, least, least | sign)
    return tl.where(magnitude == 0, least, tl.where(away, bits + 1, bits - 1))


@triton.jit
def land_rows(
    length: tl.int32, delta, data, radii, lows, low_row: tl.int64, low_column: tl.int64,
    highs, high_row: tl.int64, high_column: tl.int64, result,
    T: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The stored points nearest to data + delta, no farther from the data than the radius, and within the bounds.

    P: 1, 2, -1 for the largest magnitude, 0 for no radius. delta is float32.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = row * length
    columns = tl.arange(0, BLOCK)
    radius = tl.load(radii + row)
    factor = radius * 0 + 1.0
    if P > 0:
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, length, BLOCK):
            mask = start + columns < length
            d = tl.load(delta + offset + start + columns, mask=mask, other=0.0).to(tl.float64)
            sums += d * d if P == 2 else tl.abs(d)
        size = tl.sum(sums, 0)
        if P == 2:
            size = tl.sqrt(size)
        factor = tl.where(size > radius, radius / size * (1 - 1e-15), factor)
    for start in range(0, length, BLOCK):
        here = offset + start + columns
        mask = start + columns < length
        d = tl.load(delta + here, mask=mask, other=0.0).to(tl.float64)
        stored = tl.load(data + here, mask=mask, other=0.0)
        base = widened(stored).to(tl.float64)
        if P > 0:
            d = d * factor
        if P < 0:
            d = tl.where(d < -radius, -radius, tl.where(d > radius, radius, d))
        wish = base + d
        near = rounded(wish.to(tl.float32), T)
        wide = widened(near).to(tl.float64)
        beyond = tl.abs(wide - base) > tl.abs(wish - base)
        I: tl.constexpr = tl.int32 if T == tl.float32 else tl.int16  # noqa: SIM300
        back = neighbor(near.to(I, bitcast=True), base > wide).to(T, bitcast=True)
        x = widened(tl.where(beyond, back, near))
        if BOUNDED:
            low = widened(tl.load(lows + row * low_row + (start + columns) * low_column, mask=mask, other=0.0))
            high = widened(tl.load(highs + row * high_row + (start + columns) * high_column, mask=mask, other=0.0))
            x = tl.where(x < low, low, x)
            x = tl.where(x > high, high, x)
        tl.store(result + here, rounded(x, T), mask=mask)


@triton.jit
def usable_gradients(
    length: tl.int32, grads, keys, rows, stream: tl.int64, result, dead,
    T: tl.constexpr, BLOCK: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """Store gradients in float32, with 0 for NaN and the largest number for infinity.

    `dead`: 1 for a row whose entries are all 0 or NaN. With `DRAW`, such a row becomes a random direction.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = row * length
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        g = tl.abs(widened(tl.load(grads + offset + start + columns, mask=mask, other=0.0)))
        largest = tl.where(g > largest, g, largest)
    is_dead = tl.max(largest, 0) == 0
    tl.store(dead + row, is_dead.to(tl.int8))
    start_key = row * 0
    if DRAW:
        start_key = mixed(tl.load(keys + tl.load(rows + row)) + stream)
    for start in range(0, length, BLOCK):
        mask = start + columns < length
        g = widened(tl.load(grads + offset + start + columns, mask=mask, other=0.0))
        g = tl.where(g == g, g, 0.0)
        g = tl.where(g > 3.4028234663852886e38, 3.4028234663852886e38, g)
        g = tl.where(g < -3.4028234663852886e38, -3.4028234663852886e38, g)
        if DRAW:  # noqa: SIM102 - a constant and a value
            if is_dead:
                g = normals(random_bits(start_key, start + columns)).to(tl.float32)
        tl.store(result + offset + start + columns, g, mask=mask)


@triton.jit
def random_rows(
    length: tl.int32, keys, rows, draw: tl.int64, result,
    T: tl.constexpr, BLOCK: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Random numbers of rows, float64."""
    row = tl.program_id(0).to(tl.int64)
    start_key = mixed(tl.load(keys + tl.load(rows + row)) + draw)
    columns = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        bits = random_bits(start_key, start + columns)
        if UNIFORM:
            x = ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16
        else:
            x = normals(bits)
        tl.store(result + row * length + start + columns, x, mask=start + columns < length)


@triton.jit
def put_rows(
    length: tl.int32, into, rows, mask, values,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy row i of `values` to row `rows[i]` of `into`, where `mask[i]` is not 0. T is an integer type."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * length
    if tl.load(mask + row) != 0:
        columns = tl.arange(0, BLOCK)
        to = tl.load(rows + row) * length
        for start in range(0, length, BLOCK):
            inside = start + columns < length
            x = tl.load(values + offset + start + columns, mask=inside)
            tl.store(into + to + start + columns, x, mask=inside)
