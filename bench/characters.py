"""Train a character transformer on the text of the docs, by the recipe of Muon + AdamW and by torch's own optimizers.

Both start alike and see the same batches. The loss is the mean over fixed samples of the text after the last step, in
nats per character.

    python bench/characters.py [--steps 600] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim.lr_scheduler import LambdaLR

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    JointOptimizer,
    OrthogonalizedGradientOptim,
)

DOCS = Path(__file__).parent.parent / "docs"
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 16
MUON, ADAMW = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.003, "weight_decay": 0.01}


class Block(nn.Module):
    """Attention and a layer of four times the width, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = (nn.Linear(WIDTH, n * WIDTH, bias=False) for n in (3, 1))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Predict the next character, shape (N, T) to (N, T, characters)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.token(x) + self.place.weight[: x.shape[1]])))


def text(paths: Iterable[Path]) -> Tensor:
    """The text of the files, as numbers of characters."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(paths))
    place = {c: i for i, c in enumerate(sorted(set(pages)))}
    return torch.tensor([place[c] for c in pages])


def recipe(matrices: list[Tensor], rest: list[Tensor], *, mix: float = 0.95) -> list[torch.optim.Optimizer]:
    """Muon and AdamW as in docs/how-to/recipes.md."""
    muon = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.95, mix=mix),
        OrthogonalizedGradientOptim,
        params=matrices,
        param_ndim=2,
        **MUON,
    )
    return [JointOptimizer(muon, torch.optim.AdamW(rest, **ADAMW))]


def torchs(matrices: list[Tensor], rest: list[Tensor]) -> list[torch.optim.Optimizer]:
    """Muon and AdamW of torch."""
    return [torch.optim.Muon(matrices, **MUON), torch.optim.AdamW(rest, **ADAMW)]


def final_loss(make: object, steps: int, seed: int, data: Tensor) -> float:
    """Train, and return the loss on samples that are the same for everybody."""
    torch.manual_seed(seed)
    model = Transformer(int(data.max()) + 1)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    optimizers = make(matrices, rest)  # pyright: ignore[reportCallIssue]
    schedulers = [LambdaLR(optim, lambda t: 1 - t / steps) for optim in optimizers]
    gen = torch.Generator().manual_seed(seed)

    def batch(size: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=gen)
        some = data[starts[:, None] + torch.arange(CONTEXT + 1)]
        return some[:, :-1], some[:, 1:]

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x).flatten(0, 1), y.flatten())

    for _ in range(steps):
        loss = loss_of(*batch(BATCH, gen))
        model.zero_grad()
        loss.backward()
        for step in (*optimizers, *schedulers):
            step.step()
    with torch.no_grad():
        return statistics.fmean(float(loss_of(*batch(256, torch.Generator().manual_seed(i)))) for i in range(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = text(DOCS.rglob("*.md"))
    print(f"torch {torch.__version__}, {len(data)} characters, {args.steps} steps")
    differences = []
    for seed in range(args.seeds):
        ours, theirs = (final_loss(make, args.steps, seed, data) for make in (recipe, torchs))
        differences.append(ours - theirs)
        print(f"seed {seed}: recipe {ours:.4f}, torch {theirs:.4f}, difference {ours - theirs:+.1e}", flush=True)
    print(f"mean difference {statistics.fmean(differences):+.1e}")


if __name__ == "__main__":
    main()
