"""Models to attack, trained on the spot in seconds: digits, made-up classes, series and a regression."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits, make_moons
from torch import Tensor, nn
from torch.nn import functional as F

NORM_ORDER = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}


@dataclass(frozen=True)
class Case:
    """A trained model, held-out data, and what the data allow."""

    name: str
    model: nn.Module
    data: Tensor
    target: Tensor
    bounds: tuple[float, float] | None
    epsilons: dict[Any, float]


# Where about half of the digits are robust.
_DIGITS_RADII = {
    "standard": {"linf": 0.1, "l2": 0.5, "l1": 1.3, "l0": 1},
    "mlp": {"linf": 0.06, "l2": 0.35, "l1": 1.0, "l0": 1},
    "linf": {"linf": 0.18, "l2": 0.7, "l1": 1.3, "l0": 1},
    "l2": {"linf": 0.15, "l2": 0.8, "l1": 1.8, "l0": 2},
}


def _fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    loss: Callable[..., Tensor] = F.cross_entropy,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    batch: int = 64,
) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * -(-len(x) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            seen = x[rows] if attack is None else attack(model.eval(), x[rows], y[rows])
            optimizer.zero_grad()
            loss(model.train()(seen), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _pgd(epsilon: float, norm: str, steps: int = 7) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        delta = torch.zeros_like(x).uniform_(-epsilon, epsilon) if norm == "linf" else torch.zeros_like(x)
        for _ in range(steps):
            delta.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model((x + delta).clamp(0, 1)), y), delta)
            with torch.no_grad():
                if norm == "linf":
                    delta = (delta + epsilon / 3 * grad.sign()).clamp(-epsilon, epsilon)
                else:
                    delta = delta + epsilon / 3 * F.normalize(grad.flatten(1), dim=1).view_as(x)
                    delta = delta.flatten(1).renorm(2, 0, epsilon).view_as(x)
                delta = (x + delta).clamp(0, 1) - x
        return x + delta

    return attack


def _cnn(width: int = 16, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test: images (N, 1, 8, 8) in [0, 1]."""
    raw: Any = load_digits()
    x = torch.tensor(raw.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x, y = x[order], y[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def digits_case(kind: str, n: int = 250, seed: int = 0) -> Case:
    """`kind`: "standard", "linf" or "l2" (adversarially trained), or "mlp"."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits()
    if kind == "mlp":
        model = _fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)), x, y, epochs=15)
    elif kind == "standard":
        model = _fit(_cnn(), x, y, epochs=12)
    else:
        model = _fit(_cnn(), x, y, epochs=25, attack=_pgd(0.12 if kind == "linf" else 1.0, kind))
    return Case(f"digits {kind}", model, x_test[:n], y_test[:n], (0.0, 1.0), _DIGITS_RADII[kind])


DIGITS28 = Path(os.environ.get("RAI_DIGITS28", Path(__file__).parents[1] / "../shared/data/digits28_u8.npz"))
_DIGITS28_RADII = {
    "standard": {"linf": 0.1, "l2": 1.2, "l1": 6.5, "l0": 8},
    "linf": {"linf": 0.24, "l2": 1.5, "l1": 6.0, "l0": 3},
    "l2": {"linf": 0.15, "l2": 2.0, "l1": 11.0, "l0": 10},
}


def _cnn28(length: int = 800, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(length, 100), nn.ReLU(), nn.Linear(100, classes),
    )  # fmt: skip


@cache
def digits28() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test: images (N, 1, 28, 28) in [0, 1]."""
    with np.load(DIGITS28) as raw:
        x, y = torch.from_numpy(raw["x"]), torch.from_numpy(raw["y"])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x, y = x[order].float() / 255, y[order]
    return x[:7500], y[:7500], x[7500:], y[7500:]


def digits28_case(kind: str, n: int = 100, seed: int = 0) -> Case:
    """`kind`: "standard", "linf" or "l2" (adversarially trained)."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = digits28()
    model = _cnn28()
    if kind == "standard":
        _fit(model, x, y, epochs=4)
    elif kind == "linf":
        # From easy to hard: at once, the network learns nothing.
        for epsilon, epochs in ((0.05, 1), (0.1, 1), (0.15, 1), (0.2, 6)):
            _fit(model, x, y, epochs=epochs, attack=_pgd(epsilon, kind, 6))
    else:
        for epsilon, epochs in ((1.0, 1), (2.0, 5)):
            _fit(model, x, y, epochs=epochs, attack=_pgd(epsilon, kind, 6))
    return Case(f"digits 28 x 28 {kind}", model, x_test[:n], y_test[:n], (0.0, 1.0), _DIGITS28_RADII[kind])


def pairs_case(n: int = 100) -> Case:
    """A hundred classes: two of the 28 x 28 digits side by side."""
    torch.manual_seed(0)

    def paired(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        other = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        return torch.cat((x, x[other]), dim=3), 10 * y + y[other]

    x, y, x_test, y_test = digits28()
    (x, y), (x_test, y_test) = paired(x, y), paired(x_test, y_test)
    model = _cnn28(length=32 * 5 * 12, classes=100)
    _fit(model, x, y, epochs=6)
    return Case("pairs of digits", model, x_test[:n], y_test[:n], (0.0, 1.0), {"linf": 0.08, "l2": 1.0})


def moons_case(logits: int = 2) -> Case:
    """Two classes in the plane without bounds; `logits` 1 or 2."""
    torch.manual_seed(0)
    x, y = make_moons(600, noise=0.15, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, logits))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if logits == 1:
            return F.binary_cross_entropy_with_logits(output[:, 0], target.float())
        return F.cross_entropy(output, target)

    _fit(model, x[:400], y[:400], epochs=40, loss=loss)
    return Case(f"moons, {logits} logits", model, x[400:], y[400:], None, {"linf": 0.2, "l2": 0.25, "l1": 0.3, "l0": 1})


def series_case(n: int = 150) -> Case:
    """Three shapes of a noisy series (N, 1, 64) of any range: no bounds."""
    torch.manual_seed(0)
    time = torch.linspace(0, 1, 64)
    y = torch.arange(600) % 3
    frequency = (2 + 2 * y)[:, None] + 0.3 * torch.randn(600, 1)
    phase = 6.3 * torch.rand(600, 1)
    x = (20 * torch.sin(6.283 * frequency * time + phase) + 8 * torch.randn(600, 64))[:, None]
    model = nn.Sequential(
        nn.Conv1d(1, 12, 7, padding=3), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(12, 24, 5, padding=2), nn.ReLU(),
        nn.AvgPool1d(4), nn.Flatten(), nn.Linear(192, 3),
    )  # fmt: skip
    _fit(model, x[n:], y[n:], epochs=12)
    return Case("series", model, x[:n], y[:n], None, {"linf": 4.0, "l2": 15.0, "l1": 60.0, "l0": 6})


def diabetes_case() -> Case:
    """A regression: ten features, the target standardized."""
    torch.manual_seed(0)
    raw: Any = load_diabetes()
    x = torch.tensor(raw.data, dtype=torch.float32) * 20
    y = torch.tensor((raw.target - raw.target.mean()) / raw.target.std(), dtype=torch.float32)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    _fit(model, x[:300], y[:300], epochs=30, loss=lambda output, target: F.mse_loss(output[:, 0], target))
    return Case("diabetes", model, x[300:], y[300:], None, {"linf": 0.3, "l2": 0.6, "l1": 1.0, "l0": 2})
