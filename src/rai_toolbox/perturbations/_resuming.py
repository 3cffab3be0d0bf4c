"""End a solve between two evaluations of the model, and resume it later: for the long solves of `evaluate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

_RUNS = "runs"


class SolveEnded(Exception):
    """Raised by a model to end the solve that asks it: the solver asks once more, and returns what was found."""


class Keeper(ABC):
    """A callback of a solver that keeps the state of the solve after each run.

    A later solve of the same question, in one batch, goes on from that state and finds what an undisturbed one finds.
    """

    @abstractmethod
    def __call__(self, number: int, found: Tensor) -> Any:
        """Do as a callback does: return True to end the batch."""

    @abstractmethod
    def kept(self) -> Mapping[str, Tensor] | None:
        """Return the state to go on from, if there is one."""

    @abstractmethod
    def keep(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Take in the state after a run, which is put together when `state` is called."""


class Part(Protocol):
    """A part of a solve; what changes from run to run is in the attributes that `KEPT` names."""

    KEPT: ClassVar[tuple[str, ...]]


def resume(callback: Any, *parts: Part) -> int:
    """Put the parts into the state that was kept, and return how many runs that is after: 0 if nothing was kept."""
    state = callback.kept() if isinstance(callback, Keeper) else None
    if state is None:
        return 0
    for number, part in enumerate(parts):
        for name in part.KEPT:
            before = getattr(part, name)
            setattr(part, name, state[f"{number}{name}"].to(before.device, before.dtype))
    return int(state[_RUNS])


def tell(callback: Callable[[int, Tensor], Any] | None, number: int, found: Tensor, *parts: Part) -> bool:
    """Say that a run is done, with its number and what it found, and return whether the solve is to end."""
    if callback is None:
        return False
    if isinstance(callback, Keeper):

        def state() -> dict[str, Tensor]:
            kept = {f"{n}{name}": getattr(part, name) for n, part in enumerate(parts) for name in part.KEPT}
            return kept | {_RUNS: torch.tensor(number + 1)}

        callback.keep(state)
    return callback(number, found) is True
