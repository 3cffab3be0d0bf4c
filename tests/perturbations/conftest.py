"""A classifier of real digits, trained in a second."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Trained(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor


@pytest.fixture(scope="session")
def digits() -> Trained:
    raw = load_digits()
    x, y = torch.tensor(raw.data / 16, dtype=torch.float32), torch.tensor(raw.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(120):
            optimizer.zero_grad()
            noise = 0.1 * torch.randn_like(x[:1500])
            cross_entropy(model(x[:1500] + noise), y[:1500]).backward()
            optimizer.step()
        optimizer.zero_grad()
    return Trained(model.eval(), x[1500:1548].contiguous(), y[1500:1548].contiguous())
