"""Norms of rows, as a CPU computes them well; and the formula that is right on any device, over the whole range.

The one formula is scale-free: with a the largest magnitude of a datum and y = x / a, ‖x‖ = a ‖y‖. A norm computed
directly is right while it stays within `safe_range`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import can_branch_on_values, wide_dtype
from rai_toolbox.kernels._scratch import kept_memory

# Sums of float32 over many entries lose digits (7 ulp on 1,344 equal ones, 1e-3 on 2e7): norms of pieces, then their
# norm. Pieces of 128 to 1,344 take the same time.
_PIECE = 128

# Up to so many entries, sums are taken in float64: the calls cost more than the arithmetic.
_LITTLE_NUMEL = 2**14

# The largest temporary for sums of powers: it stays in the cache (2**15 to 2**20 were tried; 2**17 is half as fast).
_SUM_SCRATCH_NUMEL = 2**20


def direct_norms_of_rows(rows: Tensor, p: float) -> Tensor:
    """The norms of rows, float64, shape (N,), computed without rescaling: see `safe_range`."""
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], dtype=torch.float64)
    if is_summed(rows.dtype, p):
        return summed_norms(rows, p)
    accumulate = torch.promote_types(rows.dtype, torch.float32)
    piece = piece_length(rows.shape[1])
    if piece == rows.shape[1]:
        return torch.linalg.vector_norm(rows, p, 1, dtype=accumulate).double()
    cut = rows.shape[1] // piece * piece
    parts = torch.linalg.vector_norm(rows[:, :cut].unflatten(1, (-1, piece)), p, 2, dtype=accumulate).double()
    if cut < rows.shape[1]:
        rest = torch.linalg.vector_norm(rows[:, cut:], p, 1, keepdim=True, dtype=accumulate).double()
        parts = torch.cat([parts, rest], dim=1)
    return torch.linalg.vector_norm(parts, p, 1)


def is_summed(dtype: torch.dtype, p: float) -> bool:
    """Whether `summed_norms` is the way to norms: everywhere but where torch's own are as good, and faster."""
    return p != math.inf and (p != 2 or dtype == torch.float64)


def summed_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of rows, float64, as roots of sums of powers.

    torch's sums are cascades, right to an eps or two whatever the length; its norms are not: of order 1 they are off by
    30 ulp on 1,024 entries, of order 2 by 16 in float64, and of order 1 they take 8 times as long.
    """
    dtype = rows.dtype if p == 1 else torch.float64  # magnitudes need no wider one, powers do
    size = min(rows.numel(), _SUM_SCRATCH_NUMEL)
    is_plain = can_branch_on_values(rows)  # then there is memory: an allocation costs as much as a pass over memory
    scratch = kept_memory((size,), "powers", dtype) if is_plain else rows.new_empty(size, dtype=dtype)
    return _root(_sums_of_powers(rows, p, scratch), p)


def row_sums(rows: Tensor) -> Tensor:
    """The sums of rows, shape (N, 1), in pieces where that is a matter of a view."""
    piece = piece_length(rows.shape[1])
    if piece == rows.shape[1] or rows.shape[1] % piece or not rows.is_contiguous():
        return rows.sum(1, keepdim=True)
    return rows.view(rows.shape[0], -1, piece).sum(2).sum(1, keepdim=True)


def _sums_of_powers(rows: Tensor, p: float, scratch: Tensor) -> Tensor:
    piece = piece_length(rows.shape[1])
    is_cut = piece < rows.shape[1] and rows.shape[1] % piece == 0 and rows.is_contiguous()
    little = rows.numel() <= _LITTLE_NUMEL
    accumulate = torch.float64 if little else torch.promote_types(scratch.dtype, torch.float32)
    if is_cut or piece == rows.shape[1]:  # fewer and simpler calls
        sums = []
        pieces = rows.view(-1, piece) if is_cut else rows
        for part in pieces.split(scratch.numel() // piece):
            sums.append(_powers(part, p, scratch).sum(1, dtype=accumulate))  # noqa: PERF401 - the memory is one
        total = torch.cat(sums) if len(sums) > 1 else sums[0]
        return total.view(rows.shape[0], -1).sum(1, dtype=torch.float64) if is_cut else total.double()
    columns = min(rows.shape[1], scratch.numel())
    lines = max(1, scratch.numel() // max(1, columns))
    sums = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    for some, total in zip(rows.split(lines), sums.split(lines), strict=True):
        for part in some.split(columns, 1):
            powers = _powers(part, p, scratch)
            cut = part.shape[1] // piece * piece
            total += powers[:, :cut].unflatten(1, (-1, piece)).sum(2, dtype=accumulate).sum(1, dtype=torch.float64)
            if cut < part.shape[1]:
                total += powers[:, cut:].sum(1, dtype=accumulate)
    return sums


def _powers(part: Tensor, p: float, scratch: Tensor) -> Tensor:
    """The powers of magnitudes, in scratch memory."""
    powers = scratch[: part.numel()].view(part.shape)
    if part.dtype == powers.dtype:
        torch.abs(part, out=powers)
    else:
        powers.copy_(part).abs_()
    return powers if p == 1 else powers.pow_(p)


def _root(total: Tensor, p: float) -> Tensor:
    """The p-th root of numbers ≥ 0; the derivative at 0 is 0."""
    if p == 1:
        return total
    zero = total == 0
    positive = torch.where(zero, torch.ones_like(total), total)
    if p == 2:
        root = positive.sqrt()
    else:
        root = positive ** (1 / p)
        # 1/p is rounded, which a root of 1e300 shows: one step of Newton's method on root^p
        root = root * (1 - ((root**p - positive) / positive) / p).detach()
    return torch.where(zero, total, root)


def scaled_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of rows, float64, shape (N,), right for every finite float32; no sync on any device."""
    y, a = rescaled(rows, 1)
    return (plain_norm(y, p, 1) * a).reshape(-1)


def plain_norm(y: Tensor, p: float, k: int) -> Tensor:
    """The norm over the last k dimensions, kept with size 1, of magnitudes whose powers are within range."""
    a = y.abs()
    if k == 0:
        return a
    a = a.flatten(y.ndim - k)
    if p == math.inf and a.shape[-1]:
        norm = a.amax(-1)
    else:  # torch has no largest magnitude of nothing; every norm of it is 0
        norm = _root((a if p == 1 or p == math.inf else a.pow(p)).sum(-1), 1 if p == math.inf else p)
    return norm.reshape(*y.shape[: y.ndim - k], *(1,) * k)


def rescaled(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`(y, a)`: x = a·y with the largest magnitude of each datum of y being 1; a counts as a constant."""
    wide = wide_dtype(x)
    x = x.to(wide.to_complex() if x.is_complex() else wide)
    a = x.detach().abs()
    if a.numel() == 0:
        a = a.new_ones((*x.shape[: x.ndim - k], *(1,) * k))
    elif k:
        a = a.amax(tuple(range(-k, 0)), keepdim=True)
    a = torch.where(a == 0, torch.ones_like(a), a)
    return x / a, a


@functools.lru_cache(maxsize=1024)
def piece_length(numel: int) -> int:
    """How long the pieces of a row are: a divisor of its length where there is a good one."""
    return numel if numel <= 2 * _PIECE else divisor_near(numel, _PIECE) or _PIECE


@functools.lru_cache(maxsize=1024)
def divisor_near(numel: int, n: int) -> int:
    """The largest divisor of `numel` between n / 4 and 2 n, at most `numel` / 4; 0 if there is none."""
    return next((d for d in range(min(2 * n, numel // 4), n // 4, -1) if numel % d == 0), 0)


def safe_range(dtype: torch.dtype, p: float) -> tuple[float, float]:
    """Between which norms the direct formula is right: no power of an entry that matters left the range."""
    summed_in_double = p not in (1, 2, math.inf)
    if dtype == torch.float16 and not summed_in_double:  # in float32, whose range the powers do not leave
        return 0.0, 1e36
    decades = 300 if dtype == torch.float64 or summed_in_double else 36
    if p == math.inf:
        return 10.0**-decades, 10.0**decades
    return 10 ** (6 - decades / p), 10 ** (decades / p)


def safe_factors(dtype: torch.dtype) -> tuple[float, float]:
    """Between which magnitudes a factor of data of this dtype keeps its digits, in the dtype that it is used in."""
    return (1e-290, 1e290) if dtype == torch.float64 else (1e-36, 1e36)
