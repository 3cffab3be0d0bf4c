"""What is evaluated: a model, its data, the bounds and the settings. All stages and checks of a run get it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.robustness.attack._settings import Box, Settings
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import Evaluated


class Part(Protocol):
    """Keeps what a batch has found before it is done, by name."""

    def get(self, name: str) -> Mapping[str, NDArray] | None:
        """Return what was kept under a name."""

    def put(self, name: str, arrays: Mapping[str, NDArray]) -> None:
        """Keep arrays under a name, instead of what was there."""


@dataclass(frozen=True)
class EarlierPoints:
    """Perturbed inputs in one norm, any number of them for a sample."""

    index: NDArray  # shape (P,): of which samples
    perturbed: NDArray  # shape (P, ...): the inputs
    distance: NDArray  # shape (P,): from the unperturbed inputs, as it was measured


@dataclass
class Subject:
    """The model, its data and the settings, as every stage and check of a run gets them."""

    model: Evaluated
    samples: Samples
    targets: NDArray
    box: Box
    settings: Settings
    device: torch.device
    # The samples whose perturbed inputs are kept, for the gallery chosen before anything is known about them.
    shown: Container[int] = frozenset()
    earlier: Mapping[str, EarlierPoints] = field(default_factory=dict)  # by norm, what earlier evaluations have found
    corruptions: Mapping[str, Callable[[torch.Tensor, float], Any]] = field(default_factory=dict)  # by their names
    late: Callable[[], bool] | None = None  # asked before each call of the model whether the time limit has come
    cut: bool = False  # whether it has ended some work before its end, since this was set to False
    part: Part | None = None  # where a batch under way keeps what it has found
    expected: float = math.inf  # how many samples the batch under way will send through the model, about
    begun: int = 0  # how many had gone through it before
    _begun_at: float = 0.0  # when that was, in seconds
    has_gradient: bool = True  # whether a gradient reaches the model's input; without, it is searched by queries
    _last_word: bool = False

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.samples) // self.settings.batch_size)

    @property
    def classifies(self) -> bool:
        """Whether the task has labels."""
        return self.settings.task == "classification"

    @property
    def modules(self) -> list[nn.Module]:
        """The user's modules: those with a training mode."""
        return [part for part in (self.model.model, self.model.preprocess) if isinstance(part, nn.Module)]

    def span(self, batch: int) -> tuple[int, int]:
        """Return the first index of a batch and the one after its last."""
        size = self.settings.batch_size
        return batch * size, min(len(self.samples), (batch + 1) * size)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets on the device."""
        x = self.samples.inputs(start, stop, self.model.dtype).to(self.device)
        return x, torch.from_numpy(self.targets[start:stop]).to(self.device)

    def subset(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of some samples on the device."""
        x = self.samples.gather(indices, self.model.dtype).to(self.device)
        return x, torch.from_numpy(self.targets[np.asarray(indices, dtype=np.int64)]).to(self.device)

    def watch(self) -> None:
        """End what is under way if the time limit has come: called before each call of the model.

        Raises SolveEnded: a solver that asks the model then returns what it has found; `last_word` lets it be looked
            at.
        """
        if not self._last_word and self.late is not None and self.late():
            self.cut = self._last_word = True
            raise SolveEnded("the time limit has come")

    @contextlib.contextmanager
    def last_word(self, *, now: bool = False) -> Iterator[None]:
        """Around a solver and what follows it: once the time limit has ended it, the model answers till the end.

        now: whether it does so from the start.
        """
        before = self._last_word
        self._last_word = now
        try:
            yield
        finally:
            self._last_word = before

    def begin(self, passes: float) -> None:
        """Begin a batch, whose samples go through the model so many times in all, about."""
        self.begun, self.expected, self._last_word = self.model.forwards, max(1.0, passes), False
        self._begun_at = time.perf_counter()

    @property
    def spent(self) -> dict[str, float]:
        """What the batch under way has cost: forward passes of samples, and seconds."""
        return {"forwards": self.model.forwards - self.begun, "seconds": time.perf_counter() - self._begun_at}

    @property
    def done(self) -> float:
        """The share of the batch under way that is done, below 1."""
        return min(0.99, (self.model.forwards - self.begun) / self.expected)

    def generator(self, *what: object) -> torch.Generator:
        """Return a generator of its own for one purpose: which process does the work, and when, does not show."""
        words = repr((self.settings.seed, *what)).encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)
