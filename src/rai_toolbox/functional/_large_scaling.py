"""Scale data that the plans of `_scaling` leave: those larger than a block, and those with norms of unusual size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.functional._layout import BLOCK_NUMEL, as_rows
from rai_toolbox.functional._norms import direct_norms, normalize, plain_norm
from rai_toolbox.functional._projections import project_l2_ball
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.kernels._machine import seen, wide_dtype
from rai_toolbox.kernels._threads import share_out

# A datum larger than a block is shared out in pieces of so many entries.
_PIECE_NUMEL = 2**19


def scaled_exactly(x: Tensor, k: int, factor: NormFactor) -> Tensor:
    """Multiply each datum by the factor of its norm, out of place, for norms of any size."""
    if factor.kind == "ball":
        y = project_l2_ball(x, factor.bound, param_ndim=k)
    else:
        y = normalize(x, factor.p, param_ndim=k, eps=factor.bound)  # pyright: ignore[reportArgumentType]
    return y.mul_(factor.scale) if factor.scale != 1 else y


def large_norm(x: Tensor, p: float) -> Tensor:
    """The norm of a 1-D tensor of any size, float64, shape (1,): `direct_norms` of pieces that threads share out."""
    return norm_of_parts(share_out(lambda piece: direct_norms(piece, 1, p), pieces_of(x)), p)


def norm_of_parts(norms: Sequence[Tensor], p: float) -> Tensor:
    """The norm of a datum, of whose `pieces_of` these are the norms; float64, shape (1,)."""
    return direct_norms(torch.cat(list(norms)), 1, p)


def pieces_of(x: Tensor) -> Sequence[Tensor]:
    """Cut a large tensor into pieces of bounded size, in the order of its memory where that is dense."""
    rows = as_rows(x, x.ndim)
    return [x] if rows is None else rows[0].split(_PIECE_NUMEL)


def multiply_large_(x: Tensor, factor: Tensor) -> None:
    """Multiply a large tensor by a 0-d one."""
    share_out(lambda piece: piece.mul_(factor), pieces_of(x))


def redo_(x: Tensor, k: int, rows: Tensor, factor: NormFactor) -> None:
    """Scale the data of `x` that `rows` marks, by the formula for norms of any size."""
    if k == x.ndim:
        if rows.item() and not (x.numel() > BLOCK_NUMEL and scale_large_datum_(x, factor)):
            x.copy_(scaled_exactly(x, k, factor))
        return
    where = rows.view(x.shape[: x.ndim - k]).nonzero(as_tuple=True)
    if where[0].numel():
        x[where] = scaled_exactly(x[where], k, factor)


def scale_large_datum_(x: Tensor, factor: NormFactor) -> bool:
    """Scale one large datum by pieces, in float64, without waiting for a device.

    Returns whether it is done. On a CPU a datum with a norm or a factor that float64 cannot hold is left as it is.
    """
    work = wide_dtype(x)
    flat = as_rows(x, x.ndim)
    flat = x if flat is None else flat[0]
    pieces = flat.split(BLOCK_NUMEL // 2) if flat.ndim == 1 else list(flat.unbind(0))
    a = torch.stack([torch.linalg.vector_norm(piece, math.inf) for piece in pieces]).amax().to(work)
    a = torch.where(a == 0, torch.ones_like(a), a)
    parts = [plain_norm((piece.to(work) / a).reshape(-1), factor.p, 1) for piece in pieces]
    norm = plain_norm(torch.cat(parts), factor.p, 1) * a
    times = factor.of_(norm.clone(), x.dtype, x.numel())
    size = seen(lambda: abs(times.item()) if norm.isfinite() else math.inf, x)
    if size is not None and not (1e-290 <= size <= 1e290 or size == 0):
        return False
    for piece in pieces:
        wide = piece.to(work)
        piece.copy_(torch.where(times == 1, wide, wide * times))
    return True
