"""A model that takes batches of one size only, made to take any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class FixedBatch(nn.Module):
    """Calls a model in batches of the one size that it takes; the last one is filled up, and the filling cut off.

    model: from `size` inputs to `size` outputs: a tensor, or a tuple, list or dict of them.
    size: how many.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, x: torch.Tensor) -> Any:
        count = len(x)
        missing = -count % self.size if count else self.size
        if missing:
            filling = x[-1:].detach() if count else x.new_zeros(1, *x.shape[1:])
            x = torch.cat([x, filling.expand(missing, *x.shape[1:])])
        return _joined([self.model(part) for part in x.split(self.size)], self.size, count)


def _joined(parts: list[Any], size: int, count: int) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)[:count] if first.ndim and len(first) == size else first
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts], size, count) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_joined(list(same), size, count) for same in zip(*parts, strict=True))
    return first
