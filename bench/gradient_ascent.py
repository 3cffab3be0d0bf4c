"""What a step of `gradient_ascent` costs, beside bare passes of the model and beside a loop written by hand.

    python bench/gradient_ascent.py                  # the table, and bench-results/gradient_ascent.json
    python bench/gradient_ascent.py --case linear --rounds 50

`passes` is the model's forward pass, the loss, and the backward pass to the input; `loop` is PGD written by hand around
it (step, projection). Each runs a few steps in turn; a figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent

LR, EPSILON = 0.01, 0.1


class Residual(nn.Module):
    """The block of ResNet-18 (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.skip = nn.Identity()
        if stride != 1 or width_in != width:
            self.skip = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu_()


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for width_in, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        layers += [Residual(width_in, width, 1 if width == 64 else 2), Residual(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


# Model, shape of a datum, steps per round.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(64, 10), (64,), 100),
    "small CNN": (small_cnn, (1, 8, 8), 20),
    "ResNet-18": (resnet18, (3, 64, 64), 1),
}


def passes(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Forward and backward to the input, nothing else."""
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(cross_entropy(model(leaf), y, reduction="sum"), leaf)


def loop(model: nn.Module, x: Tensor, y: Tensor, steps: int, norm: str) -> Tensor:
    """Projected gradient ascent, written by hand."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(x + delta), y, reduction="sum"), delta)
        with torch.no_grad():
            if norm == "Linf":
                delta = delta.add_(grad.sign_(), alpha=LR).clamp_(-EPSILON, EPSILON)
            else:
                flat = grad.flatten(1)
                delta = delta.add_((flat / flat.norm(dim=1, keepdim=True).clamp_min_(1e-12)).view_as(x), alpha=LR)
                size = delta.flatten(1).norm(dim=1).clamp_min_(1e-12)
                delta.mul_((EPSILON / size).clamp_max_(1).view(-1, *(1,) * (x.ndim - 1)))
        delta = delta.detach()
    return x + delta


def solve(model: nn.Module, x: Tensor, y: Tensor, steps: int, norm: str) -> Tensor:
    """The same by `gradient_ascent`."""
    optimizer = {"Linf": LinfProjectedOptim, "L2": L2ProjectedOptim}[norm]
    return gradient_ascent(
        model=model, data=x, target=y, optimizer=optimizer, epsilon=EPSILON, lr=LR, steps=steps
    )[0]  # fmt: skip


def run_case(name: str, rounds: int, batch: int, device: str) -> list[dict[str, Any]]:
    make, shape, steps = CASES[name]
    torch.manual_seed(0)
    model = make().to(device).eval().requires_grad_(False)
    x = torch.rand(batch, *shape, device=device)
    y = torch.randint(10, (batch,), device=device)
    if name == "ResNet-18":
        rounds = min(rounds, 7)
    rows = []
    for norm in ("Linf", "L2"):
        runs: dict[str, Callable[[int], Any]] = {
            "passes": partial(passes, model, x, y),
            "loop": partial(loop, model, x, y, norm=norm),
            "ours": partial(solve, model, x, y, norm=norm),
        }
        # Two lengths, and their difference: what a solve costs once is not what a step costs.
        times = {who: ([], []) for who in runs}
        for done in range(rounds + 1):
            for who, run in runs.items():
                for length, spent in zip((1, 1 + steps), times[who], strict=True):
                    begin = time.perf_counter()
                    run(steps=length)
                    if device != "cpu":
                        torch.cuda.synchronize()
                    if done:
                        spent.append(time.perf_counter() - begin)
        one, many = ({who: statistics.median(spent[i]) for who, spent in times.items()} for i in (0, 1))
        step = {who: (many[who] - one[who]) / steps for who in runs}
        row = {
            "model": name, "norm": norm, "us per step of passes": 1e6 * step["passes"],
            "ours to passes": step["ours"] / step["passes"], "loop to passes": step["loop"] / step["passes"],
            "ours to loop": step["ours"] / step["loop"],
            "us beyond passes": 1e6 * (step["ours"] - step["passes"]), "us once": 1e6 * (one["ours"] - step["ours"]),
        }  # fmt: skip
        rows.append(row)
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    """Measure, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-results/gradient_ascent.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {args.device}, 1 thread, batch {args.batch}")
    rows = [row for case in args.case or CASES for row in run_case(case, args.rounds, args.batch, args.device)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
