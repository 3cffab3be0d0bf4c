"""What ranks do in the tests of cut data whose costly work they share out between themselves."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from on_ranks_sharded import counted, full, placements_of, run_both, sharded
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rai_toolbox import optim
from rai_toolbox.optim import _sharded_data


def _muon(params: Any, **options: Any) -> torch.optim.Optimizer:
    links = partial(optim.AveragedGradientOptim, decay=0.9, mix=0.9), optim.OrthogonalizedGradientOptim
    return optim.ChainedParamTransformingOptimizer(
        *links, params=params, lr=0.1, weight_decay=0.1, **{"param_ndim": 2, **options}
    )


# What takes whole data, one of a kind; the tensors have two or three dimensions.
COSTLY: dict[str, Any] = {
    "Muon": _muon,
    "exact": partial(optim.OrthogonalizedGradientOptim, lr=0.1, steps=None),
    "row blocks": partial(optim.OrthogonalizedGradientOptim, lr=0.1, row_blocks=2),
    "SpectralBallOptim": partial(optim.SpectralBallOptim, lr=0.1, epsilon=0.75, param_ndim=2),
    "StiefelOptim": partial(optim.StiefelOptim, lr=0.1),
    "SpectralFrankWolfe": partial(optim.SpectralFrankWolfe, epsilon=0.75),
    "SphereOptim": partial(optim.SphereOptim, lr=0.1, epsilon=0.75, param_ndim=2),
    "TopQGradientOptimizer": partial(optim.TopQGradientOptimizer, lr=0.1, q=0.7, param_ndim=2),
    "L1qFrankWolfe": partial(optim.L1qFrankWolfe, epsilon=0.75, q=0.6, param_ndim=2),
    "L1BallOptim": partial(optim.L1BallOptim, lr=0.1, epsilon=1.5, param_ndim=2),
    "L2BallOptim in a box": partial(optim.L2BallOptim, lr=0.1, epsilon=0.75, lower=-0.1, upper=0.5, param_ndim=2),
    "SimplexOptim": partial(optim.SimplexOptim, lr=0.1, total=1.5, param_ndim=2),
}

SHAPES = [(6, 8), (8, 6), (4, 6, 8), (12, 10), (2, 4, 5), (16, 16), (3, 6, 8), (10, 4)]


# Rows of one length are searched together, those of small tensors too, until all are done: the last digit of a row
# depends on the rows beside it.
DIGITS_OF_THE_STACK = ("L1BallOptim", "SimplexOptim")


def sharing_changes_no_bit(kind: str) -> list[str]:
    """Steps of sharded parameters and of whole ones; returns the names of what came out otherwise in some bit."""
    different = []
    for name, build in COSTLY.items():
        for param_ndim in (2,) if "blocks" in name or kind == "rows twice" else (2, None):
            for whole, part in run_both(partial(build, param_ndim=param_ndim), kind, steps=3, shapes=SHAPES):
                if name in DIGITS_OF_THE_STACK:
                    torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-6)
                elif not torch.equal(whole, part):
                    different.append(f"{name}, param_ndim={param_ndim}, {tuple(whole.shape)}")
    return different


def _prepared(name: str, kind: str, shapes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
    """An optimizer that has taken a step, and gradients for the next."""
    mesh, placements = placements_of(kind)
    params = [sharded(torch.randn(s), mesh, placements(len(s))).requires_grad_() for s in shapes]
    optimizer = COSTLY[name](params)
    for _ in range(2):
        for p in params:
            p.grad = sharded(torch.randn(p.shape), mesh, placements(p.ndim))
        if not optimizer.state:
            optimizer.step()
    return optimizer


def collectives_and_work(name: str, kind: str, shapes: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """The collectives of one step, and what this rank and all of them multiply, or change, for whole data."""
    optimizer = _prepared(name, kind, shapes)
    entries = 0

    def noted(data: Any) -> None:
        nonlocal entries
        entries += sum(x.numel() for _, _, x in data)
        original(data)

    original = _sharded_data._change_
    with mock.patch.object(_sharded_data, "_change_", noted), counted() as counts:
        optimizer.step()
    with FlopCounterMode(display=False) as flops:
        optimizer.step()
    own = flops.get_total_flops() or entries
    everybodys = torch.tensor(float(own))
    dist.all_reduce(everybodys)
    return sum(counts.values()), own, int(everybodys)


def options_per_datum_go_to_the_owner(kind: str) -> None:
    """Radii per datum and bounds per entry, where a datum is cut and its owner is another rank."""
    mesh, placements = placements_of(kind)
    gen = torch.Generator().manual_seed(0)
    shape = (5, 3, 8)
    x, g = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
    radii = torch.rand(15, generator=gen) + 0.2
    upper = torch.rand(shape, generator=gen) / 2
    for name, options in (
        ("L1BallOptim", {"epsilon": radii, "upper": upper}),
        ("L2BallOptim", {"epsilon": radii.view(5, 3), "lower": -0.1}),
        ("SimplexOptim", {"total": radii}),
        ("SphereOptim", {"epsilon": radii}),
    ):
        params: list[Tensor] = [x.clone(), sharded(x.clone(), mesh, placements(3))]
        for p in params:
            p.requires_grad_()
            optimizer = getattr(optim, name)([p], param_ndim=1, lr=0.5, **options)
            for _ in range(3):
                p.grad = g.clone() if p is params[0] else sharded(g.clone(), mesh, placements(3))
                optimizer.step()
        torch.testing.assert_close(full(params[1]), params[0].detach(), rtol=1e-6, atol=1e-6)  # pyright: ignore
