"""A network distilled from a model's answers, to attack instead of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rai_toolbox.kernels._machine import own_generators
from rai_toolbox.robustness.attack._settings import Box

_WIDTH = 128


def distill(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    radius: float,
    box: Box,
    generator: torch.Generator,
    points: int = 4096,
    steps: int = 300,
) -> nn.Module:
    """Return a small smooth network that decides as `model` does at and around the inputs.

    x, shape (N, ...): inputs.
    radius: the Euclidean length of the changes to learn from, at most.
    points, steps: how many answers, and how many steps of training.
    """  # fmt: skip
    inputs = _around(x, radius, box, points, generator)
    with torch.no_grad():
        answers = torch.cat([model(part) for part in inputs.split(1024)]).float().nan_to_num(0.0, 0.0, 0.0)
    if answers.shape[1] == 1:
        answers = torch.cat([torch.zeros_like(answers), answers], dim=1)
    # Their order and a part of their size; a scale that varies from point to point says nothing of decisions.
    answers = answers - answers.mean(dim=1, keepdim=True)
    scaled = answers / answers.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    labels = answers.argmax(dim=1)
    flat = inputs.flatten(1).float()
    with torch.random.fork_rng(devices=own_generators(x.device)):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(flat.shape[1], _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH), nn.GELU(),
            nn.Linear(_WIDTH, answers.shape[1]),
        ).to(x.device)  # fmt: skip
        middle, spread = flat.mean(), flat.std().clamp_min(1e-6)
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
        with torch.enable_grad():
            for _ in range(steps):
                use = torch.randint(len(flat), (256,), generator=generator).to(x.device)
                out = net((flat[use] - middle) / spread)
                loss = F.cross_entropy(out, labels[use]) + 0.1 * F.mse_loss(out, 2 * scaled[use])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    net.requires_grad_(False).eval()
    return _Twin(net, float(middle), float(spread))


class _Twin(nn.Module):
    def __init__(self, net: nn.Module, middle: float, spread: float) -> None:
        super().__init__()
        self.net, self.middle, self.spread = net, middle, spread

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.float() - self.middle) / self.spread)


def _around(x: Tensor, radius: float, box: Box, points: int, generator: torch.Generator) -> Tensor:
    """Return the inputs themselves, random points around them, and points on the way from one to another."""
    count = max(1, points - len(x))
    base = x[torch.randint(len(x), (count,), generator=generator).to(x.device)]
    other = x[torch.randint(len(x), (count,), generator=generator).to(x.device)]
    per_row = (count, *[1] * (x.ndim - 1))
    noise = torch.randn(base.shape, generator=generator).to(x)
    noise = noise / torch.linalg.vector_norm(noise.flatten(1), dim=1).reshape(per_row).clamp_min(1e-12)
    noise = noise * radius * torch.rand(per_row, generator=generator).to(x)
    way = other - base
    length = torch.linalg.vector_norm(way.flatten(1), dim=1).reshape(per_row).clamp_min(1e-12)
    way = way * (2 * radius / length).clamp_max(1.0) * torch.rand(per_row, generator=generator).to(x)
    kind = torch.rand(per_row, generator=generator).to(x)
    moved = base + torch.where(kind < 0.4, noise, torch.where(kind < 0.8, way, way + noise))
    bounds = box.of(base)
    if bounds is not None:
        moved = torch.minimum(torch.maximum(moved, bounds[0]), bounds[1])
    return torch.cat([x, moved])
