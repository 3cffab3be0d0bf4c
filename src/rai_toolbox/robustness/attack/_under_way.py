"""A batch under way: what it keeps before it is done, so that a run that is ended inside it can go on there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rai_toolbox.perturbations._resuming import Keeper
from rai_toolbox.robustness.attack._subject import Subject

# Writing may take so much of the time, and is not done more often than this.
_WRITING_SHARE = 0.05
_SECONDS_BETWEEN_WRITES = 2.0


class RunsOfSolver(Keeper):
    """A solver's callback: keeps its state from run to run, in the part of the batch.

    subject: of the batch.
    purpose: names the solve among those of the batch.
    """

    _NAME = "solve"

    def __init__(self, subject: Subject, purpose: tuple[object, ...]) -> None:
        self._subject, self._purpose = subject, repr(purpose)
        self._written, self._took = time.monotonic(), 0.0

    def __call__(self, number: int, found: Tensor) -> bool:
        """Return whether the solve ends here."""
        return self._subject.cut

    def kept(self) -> Mapping[str, Tensor] | None:
        """Return the state that an earlier process has left."""
        subject = self._subject
        arrays = None if subject.part is None else subject.part.get(self._NAME)
        if arrays is None or str(arrays["purpose"]) != self._purpose:
            return None
        subject.model.forwards = subject.begun + int(arrays["forwards"])
        state = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "biuf"}
        torch.set_rng_state(state.pop("random"))
        return state

    def keep(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Write the state, if the last time is long enough ago."""
        subject, now = self._subject, time.monotonic()
        if subject.part is None or now - self._written < max(_SECONDS_BETWEEN_WRITES, self._took / _WRITING_SHARE):
            return
        arrays: dict[str, Any] = {name: _array(tensor) for name, tensor in state().items()}
        arrays |= {"purpose": np.array(self._purpose), "forwards": np.array(subject.model.forwards - subject.begun)}
        subject.part.put(self._NAME, arrays | {"random": torch.get_rng_state().numpy()})
        self._written = time.monotonic()
        self._took = self._written - now


def _array(tensor: Tensor) -> NDArray:
    # numpy has no bfloat16, and float32 holds all of it.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
