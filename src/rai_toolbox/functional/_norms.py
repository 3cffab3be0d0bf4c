"""Norms and normalization per datum, right over the whole range of every dtype.

The one formula is scale-free: with a the largest magnitude of a datum and y = x / a,

    ‖x‖ = a ‖y‖    and    x / max(‖x‖, eps) = y / max(‖y‖, eps / a),

so that no power of an entry over- or underflows. It costs several passes; the in-place form spares them where it can.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional._docs import documented
from rai_toolbox.functional._layout import as_rows, datum_ndim, is_number
from rai_toolbox.kernels._norms import direct_norms_of_rows, plain_norm, rescaled

TINY = torch.finfo(torch.float32).tiny


@documented
def lp_norm(x: Tensor, p: float = 2, *, param_ndim: int | None = -1, keepdim: bool = False) -> Tensor:
    """Compute the Lp norm of each datum.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real or complex floating point.
    keepdim : bool
        Keep the reduced dimensions with size 1.

    Returns
    -------
    Tensor, shape (*batch,)
        float32 for float16 and bfloat16 input (whose range a norm leaves easily), else the real dtype of `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lp_norm
    >>> lp_norm(torch.tensor([[3e20, 4e20], [3e-30, 4e-30]]))
    tensor([5.0000e+20, 5.0000e-30])
    """
    k = _checked(x, p, param_ndim)
    y, a = rescaled(x, k)
    norm = (plain_norm(y, p, k) * a).to(torch.promote_types(_real_dtype(x), torch.float32))
    return norm if keepdim or k == 0 else norm.flatten(x.ndim - k).squeeze(-1)


@documented
def normalize(x: Tensor, p: float = 2, *, param_ndim: int | None = -1, eps: float = TINY) -> Tensor:
    """Divide each datum by its Lp norm: x / max(‖x‖, eps), correct to a few ulp for every finite `x`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real or complex floating point.
    eps : float
        A lower bound of the divisor, ≥ 0. A zero datum gives zero whatever `eps` is.

    Returns
    -------
    Tensor
        The shape and dtype of `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import normalize
    >>> normalize(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    k = _checked(x, p, param_ndim)
    y, a = rescaled(x, k)
    # not `eps / a`, which torch computes as (1 / a) * eps: inf for a subnormal a
    divisor = plain_norm(y, p, k).clamp_min(TINY).maximum(torch.full_like(a, eps) / a)
    return (y / divisor).to(x.dtype)


def direct_norms(x: Tensor, k: int, p: float) -> Tensor:
    """The norms of the data of `x`, float64, shape (n,), computed without rescaling: see `safe_range`."""
    rows = as_rows(x, k)
    if rows is None:
        rows = x.reshape(math.prod(x.shape[: x.ndim - k]), -1) if x.numel() else x.new_zeros(_count(x, k), 0)
    return direct_norms_of_rows(rows, p)


def scaled_norms(x: Tensor, k: int, p: float) -> Tensor:
    """The norms of the data of `x`, float64, shape (n,), right for every finite float32; no sync on any device."""
    y, a = rescaled(x, k)
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
