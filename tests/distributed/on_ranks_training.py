"""What ranks do in the tests of torch's own ways of training on several of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from on_ranks_sharded import BUILDS, LargestIsOne, counted, full, mesh_of, placements_of, sharded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from rai_toolbox import optim
from rai_toolbox.optim import _sharding, _shards

CLASSES = [name for name in BUILDS if " " not in name and name != "FrankWolfe"]


def network() -> nn.Sequential:
    """Layers that two or four ranks cannot share evenly, but for the first, and of which a rank may get nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(8, 6, generator=gen), torch.randn(8, 3, generator=gen)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10, alike: bool = True) -> None:
    """Steps on the same batches everywhere, or on this rank's share of each."""
    rank, n = (0, 1) if alike else (dist.get_rank(), dist.get_world_size())
    for x, y in batches(steps):
        loss = (model(x[rank::n]) - y[rank::n]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def alone(build: Any, steps: int = 10) -> list[Tensor]:
    """The parameters after the same steps in one process."""
    model = network()
    torch.manual_seed(5)
    with optim.independent_draws():
        train(model, build(model.parameters()), steps)
    return [p.detach() for p in model.parameters()]


# A polar factor multiplies the rounding of a gradient by the condition of the matrix.
POLAR = ("OrthogonalizedGradientOptim", "StiefelOptim", "SpectralFrankWolfe")


def _agree(expected: list[Tensor], got: list[Tensor], what: str, tolerance: float = 2e-5) -> None:
    tolerance = 100 * tolerance if what.startswith(POLAR) else tolerance
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def fsdp2_agrees(hybrid: bool, param_ndim: int | None, names: list[str], layer_by_layer: bool) -> None:
    n = dist.get_world_size()
    mesh = mesh_of(2, n // 2, names=("outer", "inner")) if hybrid else mesh_of(n)
    for name in names:
        build = partial(BUILDS[name], param_ndim=param_ndim)
        model = network()
        if layer_by_layer:
            for layer in model:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.manual_seed(5)
        train(model, build(model.parameters()), alike=False)
        _agree(alone(build), [full(p) for p in model.parameters()], name)


def tensor_parallel_agrees() -> None:
    for name in CLASSES:
        for param_ndim in (-1, 1, None):
            build = partial(BUILDS[name], param_ndim=param_ndim)
            mesh = mesh_of(dist.get_world_size())
            model = parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            torch.manual_seed(5)
            train(model, build(model.parameters()))
            parts = [full(p) if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
            _agree(alone(build), parts, f"{name} {param_ndim}")


def ddp_agrees() -> None:
    for name in CLASSES:
        build = partial(BUILDS[name], param_ndim=-1)
        model = DistributedDataParallel(network())
        torch.manual_seed(5 + 100 * dist.get_rank())  # dq > 0: rank 0's draws hold
        train(model, build(model.parameters()), alike=False)
        _agree(alone(build), [p.detach() for p in model.parameters()], name)
        first = [p.detach().clone() for p in model.parameters()]
        for x, p in zip(first, model.parameters(), strict=True):
            dist.broadcast(x, 0)
            assert torch.equal(x, p), f"{name}: the replicas have drifted apart"


def draws_are_rank_0s() -> list[float]:
    """The shares that a chain of two random links draws in two steps, with a seed of its own on every rank."""
    shares: list[float] = []
    gen = torch.Generator().manual_seed(dist.get_rank())

    def noted(self: Any, group: Any) -> Any:
        draw = original(self, group)
        return lambda: shares.append(draw()) or shares[-1]

    from rai_toolbox.optim._random import Draws

    original = Draws.of_q
    with mock.patch.object(Draws, "of_q", noted):
        params = [torch.ones(3, 4, requires_grad=True) for _ in range(2 + dist.get_rank())]  # not as many everywhere
        link = partial(optim.TopQGradientOptimizer, q=0.5, dq=0.4, generator=gen)
        optimizer = optim.ChainedParamTransformingOptimizer(link, link, params=params, lr=0.1)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            with counted() as counts:
                optimizer.step()
        with optim.independent_draws():
            optimizer.step()
    assert sum(counts.values()) == 1, counts  # for both links, since they share the generator
    return shares


def unequal_solves(times: list[int]) -> float:
    """Solve a different number of times on each rank: nobody must wait for anybody."""
    from rai_toolbox.perturbations import gradient_ascent

    for _ in range(times[dist.get_rank()]):
        gradient_ascent(
            model=nn.Identity(),
            data=torch.zeros(2, 3),
            target=torch.tensor([0, 1]),
            optimizer=optim.L1qNormedGradientOptim,
            q=0.5,
            dq=0.3,
            lr=0.1,
            steps=2,
        )
    dist.barrier()
    return 1.0


def collectives_of_a_step(name: str, kind: str, param_ndim: int | None, n_params: int, n_groups: int) -> int:
    """How many collectives one step takes."""
    mesh, placements = placements_of(kind)
    params = [sharded(torch.randn(8, 6), mesh, placements(2)).requires_grad_() for _ in range(n_params)]
    groups = [{"params": params[i::n_groups]} for i in range(n_groups)]
    optimizer = BUILDS[name](groups, param_ndim=param_ndim)
    for p in params:
        p.grad = sharded(torch.randn(8, 6), mesh, placements(2))
    optimizer.step()
    for p in params:
        p.grad = sharded(torch.randn(8, 6), mesh, placements(2))
    with counted() as counts:
        optimizer.step()
    return sum(counts.values())


def staged_exchange_agrees() -> None:
    """On a mesh that leaves ranks out, norms and data go along one dimension of the mesh after the other."""
    from on_ranks_sharded import steps_agree

    with mock.patch.object(_shards, "covers_the_world", return_value=False):
        for kind in ("rows and columns", "rows twice"):
            steps_agree(kind, ["L2ProjectedOptim", "L1ProjectedOptim", "LargestIsOne"], [None])


def small_buffers_agree() -> None:
    """Data gathered in several buffers."""
    from on_ranks_sharded import steps_agree

    with mock.patch.object(_sharding, "GATHER_BYTES", 100):
        steps_agree("rows", ["L1ProjectedOptim", "TopQGradientOptimizer"], [None])


def extremes_agree() -> None:
    """Norms far outside the range whose squares a float holds, infinities, NaN and zeros, in every dtype."""
    mesh, placements = placements_of("columns")
    builds = {
        "normalize": partial(optim.L2NormedGradientOptim, lr=0.0, div_by_zero_eps=0.0),
        "normalize L1": partial(optim.L1NormedGradientOptim, lr=0.0, div_by_zero_eps=0.0),
        "project": partial(optim.L2BallOptim, lr=1.0, epsilon=0.75),
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        gen = torch.Generator().manual_seed(0)
        small, large, tiny = info.smallest_normal * info.eps, info.max, info.tiny
        if dtype == torch.float64:  # whose norms are exchanged in float64, too
            small, large, tiny = 1e-305, 1e305, 1e-304
        rows = torch.randn(8, 9, generator=gen, dtype=torch.float64).clamp(-1, 1)
        sizes = [1.0, small * 8, tiny, large, math.sqrt(large), math.sqrt(tiny), 0.0, 1.0]
        x = (rows * torch.tensor(sizes, dtype=torch.float64)[:, None]).to(dtype)
        x[7, 3], x[7, 8] = math.inf, -math.inf
        for name, build in builds.items():
            results = []
            for values in (x.clone(), sharded(x.clone(), mesh, placements(2))):
                p = values.requires_grad_()
                p.grad = torch.zeros_like(values) if name == "project" else values.detach().clone()
                build([p], param_ndim=1).step()
                results.append(p if name == "project" else p.grad)
            whole, part = results[0].detach(), full(results[1])
            torch.testing.assert_close(
                part.double(),
                whole.double(),
                rtol=4 * info.eps,
                atol=2 * small,
                equal_nan=True,
                msg=lambda text, name=name, dtype=dtype: f"{name} {dtype}: {text}",
            )


def tensor_options_agree(kind: str) -> None:
    """A radius per datum and bounds per entry: each rank uses those of its own data."""
    mesh, placements = placements_of(kind)
    gen = torch.Generator().manual_seed(0)
    shape = (5, 3, 4)
    x, g = torch.randn(shape, generator=gen), torch.randn(shape, generator=gen)
    for k in (1, 2, None):
        batch = shape[: 3 - (3 if k is None else k)]
        epsilon = torch.rand(batch or (1,), generator=gen) + 0.2
        lower = -torch.rand(3, 4, generator=gen) / 5
        options: dict[str, dict[str, Any]] = {
            "L1BallOptim": {"epsilon": epsilon, "lower": lower},
            "L2BallOptim": {"epsilon": epsilon, "lower": lower},
            "LinfBallOptim": {"epsilon": epsilon, "lower": lower, "upper": 0.1},
            "L2ProjectedOptim": {"epsilon": epsilon},
            "SimplexOptim": {"total": epsilon},
            "L1FrankWolfe": {"epsilon": epsilon},
            "L2FrankWolfe": {"epsilon": epsilon},
        }
        for name, some in options.items():
            params = [x.clone().requires_grad_(), sharded(x.clone(), mesh, placements(3)).requires_grad_()]
            for p in params:
                optimizer = getattr(optim, name)([p], param_ndim=k, lr=0.5, **some)
                for _ in range(3):
                    p.grad = sharded(g.clone(), mesh, placements(3)) if isinstance(p, DTensor) else g.clone()
                    optimizer.step()
            torch.testing.assert_close(
                full(params[1]),
                params[0].detach(),
                rtol=4e-6,
                atol=4e-6,
                msg=lambda text, name=name, k=k: f"{name} {k}: {text}",
            )


def bounds_that_are_sharded() -> str:
    """Bounds placed as their parameter are used; a radius that is sharded is refused."""
    mesh, _ = placements_of("rows")
    x = torch.randn(5, 4)
    upper = sharded(x.abs() / 2, mesh, [Shard(0)])
    p = sharded(x.clone(), mesh, [Shard(0)]).requires_grad_()
    p.grad = sharded(torch.ones(5, 4), mesh, [Shard(0)])
    optim.LinfBallOptim([p], lr=0.0, epsilon=10.0, upper=upper).step()
    assert torch.equal(full(p), torch.minimum(x, x.abs() / 2))
    try:
        optim.LinfBallOptim([p], lr=0.0, epsilon=10.0, upper=upper, param_ndim=None)
        optim.LinfBallOptim([p], lr=0.0, epsilon=10.0, upper=upper, param_ndim=None).step()
    except TypeError as error:
        return str(error)
    return "accepted"


def pending_sums(name: str) -> int:
    """Partial gradients, as SequenceParallel leaves them: summed before they are transformed, all in one collective."""
    mesh = mesh_of(dist.get_world_size())
    gen = torch.Generator().manual_seed(0)
    whole = [torch.randn(4, 3, generator=gen) for _ in range(5)]
    params = [sharded(x.clone(), mesh, [Replicate()]).requires_grad_() for x in whole]
    grads = [torch.randn(dist.get_world_size(), 4, 3, generator=gen) for _ in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = DTensor.from_local(g[dist.get_rank()].clone(), mesh, [Partial()], run_check=False)
    optimizer = BUILDS[name](params, param_ndim=-1)
    with counted() as counts:
        optimizer.step()
    alone = [x.clone().requires_grad_() for x in whole]
    for p, g in zip(alone, grads, strict=True):
        p.grad = g.sum(0)
    BUILDS[name](alone, param_ndim=-1).step()
    for x, p in zip(alone, params, strict=True):
        torch.testing.assert_close(full(p), x.detach())
    return sum(counts.values())


def sequence_parallel_agrees() -> bool:
    """A real LayerNorm under SequenceParallel; returns whether its gradient was pending."""
    mesh = mesh_of(dist.get_world_size())
    build = partial(optim.SignedGradientOptim, lr=0.1)
    torch.manual_seed(0)
    norm, twin = nn.LayerNorm(6), nn.LayerNorm(6)
    norm = parallelize_module(norm, mesh, SequenceParallel())
    x = torch.randn(2, 8, 6)
    norm(x).to_local().square().sum().backward()
    twin(x).square().sum().backward()
    grad: Any = norm.weight.grad
    pending = any(isinstance(p, Partial) for p in grad.placements)
    build(norm.parameters()).step()
    build(twin.parameters()).step()
    _agree([p.detach() for p in twin.parameters()], [full(p) for p in norm.parameters()], "LayerNorm")
    return pending


def fsdp1_is_refused(use_orig_params: bool) -> dict[str, str]:
    said: dict[str, str] = {}
    for name in ("SignedGradientOptim", "L2NormedGradientOptim", "L1BallOptim", "LargestIsOne"):
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        optimizer = BUILDS[name](model.parameters(), param_ndim=-1 if use_orig_params is False else None)
        try:
            train(model, optimizer, 1)
        except TypeError as error:
            said[name] = str(error)
        else:
            said[name] = ""
    return said


def asking_for_the_state_changes_nothing() -> None:
    for name in CLASSES:
        for build in (BUILDS[name], partial(BUILDS[name], InnerOpt=torch.optim.Adam)):
            if "FrankWolfe" in name and build is not BUILDS[name]:
                continue
            model = network()
            fully_shard(model)
            optimizer = build(model.parameters())
            before = [full(p).clone() for p in model.parameters()]
            state = torch.get_rng_state()
            get_optimizer_state_dict(model, optimizer)
            for x, p in zip(before, model.parameters(), strict=True):
                assert torch.equal(x, full(p)), name
            assert torch.equal(torch.get_rng_state(), state), name
            moments = [v for m in optimizer.state.values() for key, v in m.items() if key.startswith("exp_avg")]
            assert all(torch.equal(full(v), torch.zeros(v.shape)) for v in moments), name
            assert bool(moments) == (build is not BUILDS[name])


CHECKPOINTED = partial(
    optim.L2ProjectedOptim, epsilon=3.0, InnerOpt=torch.optim.Adam, lr=0.05, param_ndim=None, grad_scale=2.0
)


def _remembering(params: Any, **options: Any) -> torch.optim.Optimizer:
    links = optim.AveragedGradientOptim, LargestIsOne, optim.AveragedGradientOptim
    return optim.ChainedParamTransformingOptimizer(
        *links,
        params=params,
        InnerOpt=torch.optim.SGD,
        **{"lr": 0.05, "param_ndim": None, "grad_scale": 2.0, **options},
    )


SAVED: dict[str, Any] = {"projected": CHECKPOINTED, "remembering": _remembering}


def save_in_the_middle(folder: str, name: str, steps: int) -> list[Tensor]:
    """Train, save, train on; what the parameters are at the end."""
    model = network()
    fully_shard(model)
    optimizer = SAVED[name](model.parameters())
    train(model, optimizer, steps, alike=False)
    model_state, optimizer_state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(model, optimizer, 3, alike=False)
    return [full(p) for p in model.parameters()]


def go_on_from(folder: str, name: str) -> list[Tensor]:
    """Load what was saved on another number of ranks, with other options meanwhile, and train on."""
    model = network()
    if dist.get_world_size() > 1:
        fully_shard(model)
    optimizer = partial(SAVED[name], grad_scale=7.0, lr=9.0)(model.parameters())
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["grad_scale"] == 2.0
    train(model, optimizer, 3, alike=False)
    return [full(p) if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def full_state_loads_anywhere() -> None:
    """The whole state as plain tensors, through `torch.save` and `weights_only`, from and to shards."""
    import io

    model = network()
    fully_shard(model)
    optimizer = CHECKPOINTED(model.parameters())
    train(model, optimizer, 2, alike=False)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    if dist.get_rank() == 0:
        assert loaded["param_groups"][0]["epsilon"] == 3.0
    other = network()
    fully_shard(other)
    again = CHECKPOINTED(other.parameters())
    set_optimizer_state_dict(
        other, again, loaded, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(optimizer.state[p]["exp_avg"]), full(again.state[q]["exp_avg"]))


def a_local_zero_does_not_stop_the_others() -> bool:
    """lr = 0 and gradients that are zero on one rank only: all ranks must decide alike."""
    mesh = mesh_of(dist.get_world_size())
    x = torch.randn(4, 3)
    p = sharded(x.clone(), mesh, [Shard(0)]).requires_grad_()
    g = torch.zeros(4, 3)
    g[-1] = 1.0
    p.grad = sharded(g, mesh, [Shard(0)])
    optim.L2BallOptim([p], lr=0.0, epsilon=0.1, param_ndim=None).step()
    return bool(full(p).norm() < 0.11)
