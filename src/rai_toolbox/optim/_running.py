"""Transforms that remember: what they change an entry by depends on the entries that came before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rai_toolbox.functional._layout import blocks
from rai_toolbox.optim._memory import First, zeros_wide
from rai_toolbox.optim._options import plain
from rai_toolbox.optim._torch_private import foreach_add_, foreach_copy_, foreach_lerp_, foreach_mul_

Remembered = Mapping[str, Sequence[Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Remembering:
    """Every entry's result depends on that entry and on what is remembered of it."""

    # `function(xs, memory)` changes tensors, and what is remembered of them, in place: `memory[name][i]` has the shape
    # and the dtype of `xs[i]`, which is float32 at least.
    function: Callable[[Sequence[Tensor], Remembered], None]
    # What is remembered of a parameter, by name: a function that makes its first value from the parameter.
    remembers: Mapping[str, First]
    # For each name, a tensor for each tensor; see `with_memory`.
    memory: Remembered = dataclasses.field(default_factory=dict)

    def with_memory(self, memory: Remembered) -> Remembering:
        """Return the same transform with what is remembered of the tensors that it will change."""
        return dataclasses.replace(self, memory=memory)

    def change_(self, xs: Sequence[Tensor], ks: Sequence[int] = (), plan: object = None) -> None:
        """Change dense tensors and what is remembered of them in place."""
        if all(x.dtype == torch.promote_types(x.dtype, torch.float32) for x in xs):
            self.function(xs, self.memory)
            return
        for i, x in enumerate(xs):  # halves: block by block in float32
            parts = {name: list(blocks(some[i], 0)) for name, some in self.memory.items()}
            for j, part in enumerate(blocks(x, 0)):
                wide = part.to(torch.promote_types(x.dtype, torch.float32))
                self.function([wide], {name: [some[j]] for name, some in parts.items()})
                part.copy_(wide)


def averaging(decay: float, mix: float, weight: float | None) -> Remembering:
    """m ← decay m + weight x, x ← mix m + (1 - mix) x; None is the weight 1 - decay."""
    decay, mix = plain(decay), plain(mix)
    share = 1 - decay if weight is None else plain(weight)

    def average_(xs: Sequence[Tensor], memory: Remembered) -> None:
        means = memory["mean"]
        if share == 1 - decay:
            foreach_lerp_(means, xs, share)
        else:
            foreach_mul_(means, decay)
            foreach_add_(means, xs, alpha=share)
        if mix == 1:
            foreach_copy_(xs, means)
        else:
            foreach_lerp_(xs, means, mix)

    return Remembering(average_, {"mean": zeros_wide})
