"""Random options, drawn alike on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator


class Draws:
    """Draws from a generator that survives copies: the default generator stays the default generator."""

    def __init__(self, generator: Generator) -> None:
        if not isinstance(generator, Generator):
            raise TypeError(f"`generator` must be a torch.Generator, got {generator!r}")
        self._generator = None if generator is torch.default_generator else generator

    @property
    def generator(self) -> Generator:
        return torch.default_generator if self._generator is None else self._generator

    def of_q(self, optim_group: Mapping[str, Any]) -> Callable[[], float]:
        """A function that returns the q of a group, drawn anew at each call where its `dq` is positive."""
        q, dq = optim_group["q"], optim_group["dq"]
        if dq == 0:
            return lambda: q
        low, high = max(0.0, q - dq), min(1.0, q + dq)

        def draw() -> float:
            share = torch.rand((), generator=self.generator, device=self.generator.device, dtype=torch.float64)
            return low + (high - low) * share.item()

        return draw
