"""What goes through a model during an evaluation, by stage and by check."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from rai_toolbox.robustness.run._run import CHECKS

CHECK_NAMES = {check.name for check in CHECKS}
_CHECKING = "Checking the evaluation itself"


class Counted(torch.nn.Module):
    """A model that counts the rows that go through it forwards and back, its calls and the seconds, by stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.stage = "before"
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.times: dict[str, float] = {}
        self.since = time.perf_counter()

    def at(self, stage: str) -> None:
        """Say what comes next; what has passed belongs to what came before."""
        now = time.perf_counter()
        self.times[self.stage] = self.times.get(self.stage, 0.0) + now - self.since
        self.stage, self.since = stage, now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # No hook on the output: the checks would take it for something that hides a gradient.
        out = self.model(x)
        self.rows[self.stage] += len(x) * (2 if out.requires_grad else 1)
        self.calls[self.stage] += 1
        return out


class Stages:
    """Told by the evaluation of each call of the model."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def __call__(self, stage: str, done: int, total: int) -> None:
        pass

    def beat(self, stage: str, done: float, total: int) -> None:
        self.counted.at(CHECKS[int(done)].name if stage == _CHECKING else stage)


def share_of_checks(spent: Mapping[str, float]) -> float:
    """Of the work, that of the checks beside that of the evaluation."""
    checks = sum(value for stage, value in spent.items() if stage in CHECK_NAMES)
    stronger = sum(value for stage, value in spent.items() if stage.startswith("Attacking"))
    return checks / max(1e-9, sum(spent.values()) - checks - stronger)
