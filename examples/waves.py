"""Series to evaluate: waves of two channels and 64 points in time, to be told apart by their form.

rai-toolbox evaluate --model examples/waves.py:model --data examples/waves.py:data --norm l2 --norm linf
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("sine", "square", "saw")


def waves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Waves (count, 2, 64) of random phase and frequency with some noise, and the number of their form."""
    random = torch.Generator().manual_seed(seed)
    form = torch.arange(count) % len(NAMES)
    frequency = 2 + 2 * torch.rand(count, 1, 1, generator=random)
    phase = torch.rand(count, 2, 1, generator=random)
    turns = frequency * torch.linspace(0, 1, 64) + phase
    sine = torch.sin(2 * math.pi * turns)
    forms = torch.stack([sine, sine.sign(), 2 * (turns % 1) - 1])
    return forms[form, torch.arange(count)] + 0.1 * torch.randn(count, 2, 64, generator=random), form


def data() -> dict[str, Any]:
    """Waves that the model has not seen."""
    x, y = waves(90, seed=1)
    return {"x": x, "y": y, "class_names": NAMES}


def model() -> nn.Module:
    """Convolutions over time, trained on the spot."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 16, 7, padding=3), nn.ReLU(), nn.Conv1d(16, 16, 7, padding=3), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x, y = waves(300, seed=0)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net
