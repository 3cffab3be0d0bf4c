"""What is evaluated: a model, its data, the bounds and the settings. All stages and checks of a run get it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rai_toolbox.robustness.attack._settings import Box, Settings
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import Evaluated

__all__ = ["Subject"]


@dataclass
class Subject:
    """The model, its data and the settings, as every stage and check of a run gets them.

    Attributes
    ----------
    model, samples, targets, box, settings
        The model, its data, the bounds and the settings.
    device : torch.device
        Where.
    shown : frozenset of int
        The samples whose perturbed inputs are kept for the gallery, chosen before anything is known about them.
    corruptions : dict of str to callable
        By their names.
    late : callable or None
        Asked after each run of a solver whether the time limit has come.
    cut : bool
        Whether it has ended a solver before its last run, since this was set to False.
    """

    model: Evaluated
    samples: Samples
    targets: NDArray
    box: Box
    settings: Settings
    device: torch.device
    shown: frozenset[int] = frozenset()
    corruptions: Mapping[str, Callable[[torch.Tensor, float], Any]] = field(default_factory=dict)
    late: Callable[[], bool] | None = None
    cut: bool = False

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

    def between_runs(self, *_: object) -> bool:
        """Return whether a solver ends here, after one of its runs: it has called this."""
        self.cut |= self.late is not None and self.late()
        return self.cut

    def generator(self, *what: object) -> torch.Generator:
        """Return a generator of its own for one purpose: which process does the work, and when, does not show."""
        words = repr((self.settings.seed, *what)).encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)
