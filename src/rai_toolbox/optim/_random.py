"""Random options, drawn alike on every rank."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator

_alone: ContextVar[bool] = ContextVar("_alone", default=False)
_copies_of_rank_0s: ContextVar[Mapping[int, Generator]] = ContextVar(
    "_copies_of_rank_0s", default=types.MappingProxyType({})
)


@contextmanager
def independent_draws() -> Iterator[None]:
    """Let this process draw random options by itself, without asking the other ranks.

    Where `torch.distributed` is initialized, an optimizer with `dq > 0` takes what rank 0 draws, so that replicas of a
    model stay alike: each of its steps is a collective of the default process group, which all ranks must take part
    in. Within this context they need not, and each draws from its own generator. The solvers of
    `rai_toolbox.perturbations` use it, since their optimizers change data, which differ between ranks.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import TopQGradientOptimizer, independent_draws
    >>> x = torch.zeros(1, 4, requires_grad=True)
    >>> optim = TopQGradientOptimizer([x], lr=1.0, q=0.5, dq=0.25)
    >>> x.sum().backward()
    >>> with independent_draws():
    ...     optim.step()
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


class Draws:
    """Draws from a generator that survives copies: the default generator stays the default generator."""

    def __init__(self, generator: Generator) -> None:
        if not isinstance(generator, Generator):
            raise TypeError(f"`generator` must be a torch.Generator, got {generator!r}")
        self._generator = None if generator is torch.default_generator else generator

    @property
    def generator(self) -> Generator:
        return torch.default_generator if self._generator is None else self._generator

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Draw in this context what rank 0 draws, at the price of one collective."""
        copies = _copies_of_rank_0s.get()
        shared = id(self.generator) in copies  # by another link of a chain, which has asked for it
        if shared or _alone.get() or not _has_other_ranks():
            yield
            return
        token = _copies_of_rank_0s.set({**copies, id(self.generator): _from_rank_0(self.generator)})
        try:
            yield
        finally:
            _copies_of_rank_0s.reset(token)

    def share(self, optim_group: Mapping[str, Any]) -> tuple[Callable[[], float], Draws | None]:
        """Return what gives the q of a group, and where it is drawn from: from nowhere if `dq` is 0."""
        return self.of_q(optim_group), self if optim_group["dq"] > 0 else None

    def of_q(self, optim_group: Mapping[str, Any]) -> Callable[[], float]:
        """A function that returns the q of a group, drawn anew at each call where its `dq` is positive."""
        q, dq = optim_group["q"], optim_group["dq"]
        if dq == 0:
            return lambda: q
        low, high = max(0.0, q - dq), min(1.0, q + dq)

        def draw() -> float:
            share = _uniform(self.generator)  # in any case, so that every rank's generator advances alike
            copy = _copies_of_rank_0s.get().get(id(self.generator))
            if copy is not None:
                share = _uniform(copy)
            return low + (high - low) * share

        return draw


def _uniform(generator: Generator) -> float:
    return torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()


def _has_other_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _from_rank_0(generator: Generator) -> Generator:
    """A generator in the state of rank 0's: of one size, however many numbers each rank goes on to draw."""
    state = generator.get_state()
    sent = state.to("cpu" if "cpu" in dist.get_backend_config() else torch.device("cuda", torch.cuda.current_device()))
    dist.broadcast(sent, src=0)
    copy = Generator(generator.device)
    copy.set_state(sent.to(state.device))
    return copy
