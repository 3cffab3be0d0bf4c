"""The processes that share an evaluation: one, or as many as torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rai_toolbox.robustness._errors import EvaluationFailed, InputError, arg

T = TypeVar("T")

# A process waits at the end of a stage for the slowest; one that died is noticed at once, by its closed socket.
_PATIENCE = datetime.timedelta(days=7)


class Team:
    """One process's view of all of them.

    rank, size: which one this is, of how many.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, owns_group: bool = False) -> None:
        self.rank = rank
        self.size = size
        self._owns_group = owns_group

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Return which of `count` pieces of work are this process's."""
        return range(self.rank, count, self.size)

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks, to all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except (RuntimeError, dist.DistError) as error:
            raise EvaluationFailed(
                f"another of the {self.size} processes ended; finished batches are kept, run again with"
                f" {arg('resume', True)}"
            ) from error
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process; if one raises `InputError`, all raise it."""
        result: Any = None
        refusal: str | None = None
        try:
            result = function()
        except InputError as error:
            refusal = error.message
        for message in self.gather(refusal):
            if message is not None:
                raise InputError(message)
        return result

    def leaders_first(self, function: Callable[[], T]) -> T:
        """Call a function in the leader, then in the first process of every other machine, then in the rest, so
        that they find the leader's caches and folders.
        """
        turn = 0 if self.leads else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
        result: Any = None
        for now in range(3):
            if now == turn:
                result = self.together(function)
            else:
                self.together(lambda: None)
        return result

    def leave(self) -> None:
        """Take down the process group, if `join` set it up."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def join() -> Team:
    """Return the team of this process: that of the process group, of torchrun's environment, or of this
    process alone.
    """
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and dist.is_available():
        # gloo on GPUs too: the processes exchange small results only, which are on the host.
        dist.init_process_group("gloo", timeout=_PATIENCE)
        return Team(dist.get_rank(), dist.get_world_size(), owns_group=True)
    return Team()
