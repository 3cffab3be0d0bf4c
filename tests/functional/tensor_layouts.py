"""Shapes, strides and dtypes that every function must take."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (7,), (0,), (3, 5), (4, 0), (0, 4), (3, 2, 5), (2, 3, 4, 5), (2, 1, 3, 2, 4)]


def param_ndims(ndim: int) -> list[int | None]:
    return [None, *range(-ndim, ndim + 1)]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory of different strides; each owns its entries."""
    made = {"contiguous": x.clone()}
    if x.ndim >= 2:
        made["transposed"] = x.transpose(0, -1).contiguous().transpose(0, -1)
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7.0)
        made["sliced"] = wide[..., 1 : 2 * x.shape[-1] + 1 : 2]
        made["sliced"].copy_(x)
    if x.ndim == 4:
        made["channels_last"] = x.clone().contiguous(memory_format=torch.channels_last)
    return made


def as_rows(x: Tensor, param_ndim: int | None) -> Tensor:
    """One datum a row."""
    k = x.ndim if param_ndim is None else param_ndim + x.ndim if param_ndim < 0 else param_ndim
    n = 1
    for size in x.shape[: x.ndim - k]:
        n *= size
    return x.reshape(n, -1) if x.numel() else x.reshape(n, 0 if n else 1)
