"""What ranks do in the tests of sharded parameters."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from rai_toolbox import optim

Build = Callable[..., torch.optim.Optimizer]


class LargestIsOne(optim.ParamTransformingOptimizer):
    """A user's hooks that look at whole data, and remember."""

    def _pre_step_transform_(self, param: Tensor, optim_group: Any) -> None:
        assert param.grad is not None
        mean = self.memory(param, "mean")
        param.grad.copy_(mean.mul_(0.5).add_(param.grad))
        param.grad.div_(param.grad.abs().amax(tuple(range(1, param.ndim)), keepdim=True).clamp_min(1e-3))

    def _post_step_transform_(self, param: Tensor, optim_group: Any) -> None:
        param.sub_(param.mean(tuple(range(1, param.ndim)), keepdim=True), alpha=0.5)


SGD: dict[str, Any] = {"InnerOpt": partial(torch.optim.SGD, momentum=0.5), "lr": 0.1}


# How each class is built, and how far the result of its transforms reaches.
def _joint(params: list[Tensor], **options: Any) -> optim.JointOptimizer:
    projected = optim.L2ProjectedOptim(params[:1], epsilon=0.75, **options)
    return optim.JointOptimizer(projected, optim.AveragedGradientOptim(params[1:], **options))


BUILDS: dict[str, Build] = {
    "ParamTransformingOptimizer": partial(optim.ParamTransformingOptimizer, grad_scale=2.0, grad_bias=0.1, **SGD),
    "L1NormedGradientOptim": partial(optim.L1NormedGradientOptim, grad_scale=3.0, **SGD),
    "L2NormedGradientOptim": partial(optim.L2NormedGradientOptim, grad_bias=0.01, **SGD),
    "LpNormedGradientOptim": partial(optim.LpNormedGradientOptim, p=3, **SGD),
    "LpNormedGradientOptim inf": partial(optim.LpNormedGradientOptim, p=math.inf, **SGD),
    "SignedGradientOptim": partial(optim.SignedGradientOptim, **SGD),
    "TopQGradientOptimizer": partial(optim.TopQGradientOptimizer, q=0.6, dq=0.2, **SGD),
    "L1qNormedGradientOptim": partial(optim.L1qNormedGradientOptim, q=0.6, grad_scale=2.0, **SGD),
    "ClampedGradientOptimizer": partial(optim.ClampedGradientOptimizer, clamp_min=-0.5, clamp_max=1.0, **SGD),
    "ClampedParameterOptimizer": partial(optim.ClampedParameterOptimizer, clamp_max=0.25, **SGD),
    "L1ProjectedOptim": partial(optim.L1ProjectedOptim, epsilon=1.5, **SGD),
    "L2ProjectedOptim": partial(optim.L2ProjectedOptim, epsilon=0.75, **SGD),
    "LinfProjectedOptim": partial(optim.LinfProjectedOptim, epsilon=0.3, **SGD),
    "L1BallOptim": partial(optim.L1BallOptim, epsilon=1.5, lower=-0.4, **SGD),
    "L2BallOptim": partial(optim.L2BallOptim, epsilon=0.75, **SGD),
    "L2BallOptim in a box": partial(optim.L2BallOptim, epsilon=0.75, lower=-0.1, upper=0.5, **SGD),
    "LinfBallOptim": partial(optim.LinfBallOptim, epsilon=0.3, upper=0.2, **SGD),
    "SimplexOptim": partial(optim.SimplexOptim, total=1.5, **SGD),
    "AveragedGradientOptim": partial(optim.AveragedGradientOptim, decay=0.5, mix=0.7, grad_scale=2.0, **SGD),
    "OrthogonalizedGradientOptim": partial(optim.OrthogonalizedGradientOptim, steps=None, param_ndim=-1, **SGD),
    "SpectralBallOptim": partial(optim.SpectralBallOptim, epsilon=0.75, param_ndim=-1, **SGD),
    "SphereOptim": partial(optim.SphereOptim, epsilon=0.75, **SGD),
    "StiefelOptim": partial(optim.StiefelOptim, param_ndim=-1, **SGD),
    "SpectralFrankWolfe": partial(optim.SpectralFrankWolfe, epsilon=0.75, param_ndim=-1),
    "JointOptimizer": lambda params, **options: _joint(list(params), **{**SGD, **options}),
    "FrankWolfe": partial(optim.FrankWolfe, lmo_scaling_factor=0.5),
    "L1FrankWolfe": partial(optim.L1FrankWolfe, epsilon=0.75),
    "L2FrankWolfe": partial(optim.L2FrankWolfe, epsilon=0.75),
    "LinfFrankWolfe": partial(optim.LinfFrankWolfe, epsilon=0.75),
    "L1qFrankWolfe": partial(optim.L1qFrankWolfe, epsilon=0.75, q=0.6, dq=0.1),
    "ChainedParamTransformingOptimizer": lambda params, **options: optim.ChainedParamTransformingOptimizer(
        partial(optim.TopQGradientOptimizer, q=0.3),
        partial(optim.L2NormedGradientOptim, grad_scale=2.0, grad_bias=0.1),
        partial(optim.L2ProjectedOptim, epsilon=0.9),
        LargestIsOne,
        optim.L2NormedGradientOptim,
        params=params,
        **{**SGD, **options},
    ),
    "LargestIsOne": partial(LargestIsOne, **SGD),
}

# One of each kind: by norm, entry by entry, drawn, gathered, several stages, a user's hooks.
SOME = [
    "L2ProjectedOptim",
    "LpNormedGradientOptim inf",
    "LinfProjectedOptim",
    "TopQGradientOptimizer",
    "L1ProjectedOptim",
    "L2BallOptim in a box",
    "ChainedParamTransformingOptimizer",
    "AveragedGradientOptim",
    "OrthogonalizedGradientOptim",
    "LargestIsOne",
]

SHAPES = [(5, 4), (7,), (3, 2, 4), (1, 6)]


@cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """One mesh of each kind per process: each new one brings process groups, and gloo four threads for each of them."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def placements_of(kind: str) -> tuple[DeviceMesh, Callable[[int], Sequence[Placement]]]:
    """A mesh over all ranks, and the placements of a parameter with so many dimensions."""
    n = dist.get_world_size()
    if kind == "rows":
        return mesh_of(n), lambda ndim: [Shard(0)]
    if kind == "columns":  # tensor parallel
        return mesh_of(n), lambda ndim: [Shard(min(1, ndim - 1))]
    if kind == "last":
        return mesh_of(n), lambda ndim: [Shard(ndim - 1)]
    mesh = mesh_of(2, n // 2, names=("outer", "inner"))
    if kind == "replicated rows":  # HSDP
        return mesh, lambda ndim: [Replicate(), Shard(0)]
    if kind == "rows and columns":
        return mesh, lambda ndim: [Shard(0), Shard(min(1, ndim - 1))]
    if kind == "rows twice":  # fully_shard of what is tensor parallel already
        return mesh, lambda ndim: [_StridedShard(0, split_factor=n // 2), Shard(0)]
    raise ValueError(kind)


# torch 2.6 sends the tensor of rank 0, which is the same.
_SENDING_NOTHING: Any = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
)


def sharded(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Cut a tensor that every rank has; nothing is sent."""
    part = x
    if not any(isinstance(p, _StridedShard) for p in placements):
        return distribute_tensor(x, mesh, placements, **_SENDING_NOTHING)
    # As fully_shard does: first the inner, tensor-parallel cut, then chunks of its parts. (Torch 2.9 cuts otherwise.)
    outer, inner = mesh["outer"], mesh["inner"]
    part = distribute_tensor(x, inner, [Shard(0)], **_SENDING_NOTHING).to_local()
    part = distribute_tensor(part.contiguous(), outer, [Shard(0)], **_SENDING_NOTHING).to_local()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def run_both(
    build: Build,
    kind: str,
    steps: int = 10,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]]:
    """Steps of an optimizer of sharded parameters and of the same ones in one piece: the parameters after them."""
    mesh, placements = placements_of(kind)
    gen = torch.Generator().manual_seed(0)
    whole = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    parts = [sharded(x.detach().clone(), mesh, placements(x.ndim)).requires_grad_() for x in whole]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, many = build(whole), build(parts)
    draws = []
    for params, optimizer in ((whole, one), (parts, many)):
        torch.set_rng_state(state)
        gen.manual_seed(1)
        for _ in range(steps):
            for p, x in zip(params, whole, strict=True):
                g = torch.randn(x.shape, generator=gen, dtype=torch.float64).to(dtype)
                p.grad = sharded(g, mesh, placements(x.ndim)) if isinstance(p, DTensor) else g
            if params is parts:
                optimizer.step()
            else:
                with optim.independent_draws():
                    optimizer.step()
        draws.append(torch.get_rng_state())
    assert torch.equal(*draws), "the generator advanced differently"
    return [(x.detach(), full(p)) for x, p in zip(whole, parts, strict=True)]


def full(x: DTensor) -> Tensor:
    """The whole of a sharded tensor, put together without DTensor's own gathering (which knows no strided shards)."""
    from rai_toolbox.optim._shards import Layout, local_part, put_part_

    with torch.no_grad():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (x.device_mesh.get_coordinate(), local_part(x)))
        layout, whole = Layout(x), x.new_empty(0).to_local().new_full(x.shape, math.nan)
        for coordinate, part in gathered:
            put_part_(whole, part, layout.held(coordinate))
        assert not whole.isnan().any() or any(part.isnan().any() for _, part in gathered), "nobody holds some entries"
        return whole


def steps_agree(kind: str, names: Sequence[str], param_ndims: Sequence[int | None]) -> int:
    """Check that sharded steps equal whole ones to rounding; returns how many were compared."""
    compared = 0
    for name in names:
        for param_ndim in param_ndims:
            build = BUILDS[name]
            if name != "FrankWolfe":
                build = partial(build, param_ndim=param_ndim)
            for expected, got in run_both(build, kind):
                torch.testing.assert_close(
                    got,
                    expected,
                    rtol=4e-6,
                    atol=4e-6,
                    msg=lambda text, name=name, k=param_ndim, x=expected: (
                        f"{name}, param_ndim={k}, {tuple(x.shape)}: {text}"
                    ),
                )
                compared += 1
    return compared


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts of the collectives that are called, by name."""
    counts: dict[str, int] = {}
    with CommDebugMode() as mode:
        yield counts
    counts |= {str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()}
