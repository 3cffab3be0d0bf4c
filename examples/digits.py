"""What the examples train: a small classifier of the handwritten digits that scikit-learn ships (1,797 scans, 8×8)."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def data() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], shape (1797, 64), and classes, shape (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def classifier() -> nn.Sequential:
    """Two layers, the same ones at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def accuracy(model: nn.Module) -> float:
    """The share of digits that the model tells right."""
    x, y = data()
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()
