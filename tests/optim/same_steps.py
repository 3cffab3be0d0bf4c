"""Parameters, gradients and steps that are the same each time, for whoever compares two optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradient(shape: Any, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return gradient(shape, 1000, dtype).requires_grad_()


def step(optim: Any, *steps: int) -> None:
    for t in steps:
        for group in optim.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = gradient(p.shape, 10 * t + i, p.dtype)
        optim.step()
