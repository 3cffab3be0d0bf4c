"""Norms and normalization per datum, right over the whole range of every dtype.

The one formula is scale-free: with a the largest magnitude of a datum and y = x / a,

    ‖x‖ = a ‖y‖    and    x / max(‖x‖, eps) = y / max(‖y‖, eps / a),

so that no power of an entry over- or underflows. It costs several passes. A norm computed directly is right while it
stays within `safe_range`; on a CPU, where looking at a result costs nothing, the in-place form computes it that way
and redoes only the data whose norm lies outside.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional._layout import as_rows, datum_ndim, is_number

TINY = torch.finfo(torch.float32).tiny

# Sums of float32 over many entries lose digits (7 ulp on 1,344 equal ones, 1e-3 on 2e7): norms of pieces, then their
# norm. Pieces of 128 to 1,344 take the same time.
_PIECE = 128

# Up to so many entries, sums are taken in float64: the calls cost more than the arithmetic.
_LITTLE_NUMEL = 2**14

# The largest temporary for sums of powers: it stays in the cache (2**15 to 2**20 were tried; 2**17 is half as fast).
SUM_SCRATCH_NUMEL = 2**20


def lp_norm(x: Tensor, p: float = 2, *, param_ndim: int | None = -1, keepdim: bool = False) -> Tensor:
    """Compute the Lp norm of each datum.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real or complex floating point.
    p : float
        The order, p ≥ 1; `math.inf` for the largest magnitude.
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`.
    keepdim : bool
        Keep the reduced dimensions with size 1.

    Returns
    -------
    Tensor, shape (*batch,)
        float32 for float16 and bfloat16 input (whose range a norm leaves easily), else the real dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        `p` is not a number, or less than 1; `param_ndim` does not fit `x`; `x` is not floating point.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lp_norm
    >>> lp_norm(torch.tensor([[3e20, 4e20], [3e-30, 4e-30]]))
    tensor([5.0000e+20, 5.0000e-30])
    """
    k = _checked(x, p, param_ndim)
    y, a = _rescaled(x, k)
    norm = (plain_norm(y, p, k) * a).to(torch.promote_types(_real_dtype(x), torch.float32))
    return norm if keepdim or k == 0 else norm.flatten(x.ndim - k).squeeze(-1)


def normalize(x: Tensor, p: float = 2, *, param_ndim: int | None = -1, eps: float = TINY) -> Tensor:
    """Divide each datum by its Lp norm: x / max(‖x‖, eps), correct to a few ulp for every finite `x`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real or complex floating point.
    p : float
        The order of the norm, p ≥ 1.
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`.
    eps : float
        A lower bound of the divisor, ≥ 0. A zero datum gives zero whatever `eps` is.

    Returns
    -------
    Tensor
        The shape and dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        As `lp_norm`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import normalize
    >>> normalize(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    k = _checked(x, p, param_ndim)
    y, a = _rescaled(x, k)
    # not `eps / a`, which torch computes as (1 / a) * eps: inf for a subnormal a
    divisor = plain_norm(y, p, k).clamp_min(TINY).maximum(torch.full_like(a, eps) / a)
    return (y / divisor).to(x.dtype)


def direct_norms(x: Tensor, k: int, p: float) -> Tensor:
    """The norms of the data of `x`, float64, shape (n,), computed without rescaling: see `safe_range`."""
    rows = as_rows(x, k)
    if rows is None:
        rows = x.reshape(math.prod(x.shape[: x.ndim - k]), -1) if x.numel() else x.new_zeros(_count(x, k), 0)
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], dtype=torch.float64)
    if is_summed(x.dtype, p):
        return summed_norms(rows, p)
    accumulate = torch.promote_types(x.dtype, torch.float32)
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


def summed_norms(rows: Tensor, p: float, scratch: Tensor | None = None) -> Tensor:
    """The norms of rows, float64, as roots of sums of powers.

    torch's sums are cascades, right to an eps or two whatever the length; its norms are not: of order 1 they are off by
    30 ulp on 1,024 entries, of order 2 by 16 in float64, and of order 1 they take 8 times as long. `scratch` (see
    `scratch_dtype`), 1-D, spares an allocation, which costs as much as a pass over memory.
    """
    return _root(_sums_of_powers(rows, p, scratch), p)


def row_sums(rows: Tensor) -> Tensor:
    """The sums of rows, shape (N, 1), in pieces where that is a matter of a view."""
    piece = piece_length(rows.shape[1])
    if piece == rows.shape[1] or rows.shape[1] % piece or not rows.is_contiguous():
        return rows.sum(1, keepdim=True)
    return rows.view(rows.shape[0], -1, piece).sum(2).sum(1, keepdim=True)


def scratch_dtype(dtype: torch.dtype, p: float) -> torch.dtype:
    """Of the scratch of `summed_norms`: magnitudes need no wider one, powers do."""
    return dtype if p == 1 else torch.float64


def _sums_of_powers(rows: Tensor, p: float, scratch: Tensor | None) -> Tensor:
    if scratch is None:
        scratch = rows.new_empty(min(rows.numel(), SUM_SCRATCH_NUMEL), dtype=scratch_dtype(rows.dtype, p))
    piece = piece_length(rows.shape[1])
    if piece < rows.shape[1] and rows.shape[1] % piece == 0 and rows.is_contiguous():  # fewer and simpler calls
        return _sums_of_powers(rows.view(-1, piece), p, scratch).view(rows.shape[0], -1).sum(1)
    columns = min(rows.shape[1], scratch.numel())
    lines = max(1, scratch.numel() // max(1, columns))
    little = rows.numel() <= _LITTLE_NUMEL
    accumulate = torch.float64 if little else torch.promote_types(scratch.dtype, torch.float32)
    sums = rows.new_zeros(rows.shape[0], dtype=torch.float64)
    for some, total in zip(rows.split(lines), sums.split(lines), strict=True):
        for part in some.split(columns, 1):
            powers = scratch[: part.numel()].view(part.shape)
            if part.dtype == powers.dtype:
                torch.abs(part, out=powers)
            else:
                powers.copy_(part).abs_()
            if p != 1:
                powers.pow_(p)
            cut = part.shape[1] // piece * piece
            total += powers[:, :cut].unflatten(1, (-1, piece)).sum(2, dtype=accumulate).sum(1, dtype=torch.float64)
            if cut < part.shape[1]:
                total += powers[:, cut:].sum(1, dtype=accumulate)
    return sums


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


def scaled_norms(x: Tensor, k: int, p: float) -> Tensor:
    """The norms of the data of `x`, float64, shape (n,), right for every finite float32; no sync on any device."""
    y, a = _rescaled(x, k)
    return (plain_norm(y, p, k) * a).reshape(-1)


def _count(x: Tensor, k: int) -> int:
    return math.prod(x.shape[: x.ndim - k])


def _checked(x: Tensor, p: float, param_ndim: int | None) -> int:
    check_order(p)
    return datum_ndim(check_floating(x).ndim, param_ndim)


def check_floating(x: Tensor) -> Tensor:
    """Raise unless `x` is real or complex floating point; return it."""
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"expected a floating-point tensor, got {x.dtype}")
    return x


def check_order(p: Any) -> None:
    """Raise unless `p` is the order of a norm."""
    if not is_number(p):
        raise TypeError(f"`p` must be a number, got {p!r}")
    if not p >= 1:
        raise ValueError(f"`p` must be at least 1 (below that it is not a norm), got {p!r}")


def _real_dtype(x: Tensor) -> torch.dtype:
    return x.dtype.to_real() if x.is_complex() else x.dtype


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


def _rescaled(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`(y, a)`: x = a·y with the largest magnitude of each datum of y being 1; a counts as a constant."""
    if x.device.type != "mps":  # which has no float64
        x = x.to(torch.complex128 if x.is_complex() else torch.float64)
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
