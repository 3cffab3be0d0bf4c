"""Saving and loading: state dicts, torch.save, torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from optimizer_cases import ALL_CASES, Case
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW

from rai_toolbox import optim as rai
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedParameterOptimizer,
    L1FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

IDS = [case.name for case in ALL_CASES]


def parameter(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(optim: Any, *seeds: int) -> None:
    for seed in seeds:
        for group in optim.param_groups:
            for p in group["params"]:
                p.grad = parameter(*p.shape, seed=seed).detach()
        optim.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", ALL_CASES, ids=IDS)
def test_a_run_that_is_saved_and_loaded_goes_on_exactly(case: Case) -> None:
    def build(p: torch.Tensor, **options: Any) -> Any:
        return case.build([p], InnerOpt=functools.partial(Adam, lr=0.1), **options)

    x = parameter(3, 4)
    optim = build(x)
    optim.param_groups[0]["grad_scale"] = 2.0
    step(optim, 1, 2)
    saved = through_a_file(optim.state_dict())
    y = x.detach().clone().requires_grad_()
    other = build(y)
    other.load_state_dict(saved)
    assert other.param_groups[0]["grad_scale"] == 2.0
    step(optim, 3, 4)
    step(other, 3, 4)
    assert torch.equal(x, y)


def test_every_option_round_trips_tensors_included() -> None:
    options = {"epsilon": torch.tensor([0.5, 1.0]), "lower": -torch.ones(2, 3), "upper": 2.0, "param_ndim": None}
    options |= {"grad_scale": 2.0, "grad_bias": 0.5, "epsilon": torch.tensor(0.5)}
    optim = rai.L2BallOptim([parameter(2, 3)], lr=0.5, **options)  # type: ignore[arg-type]
    saved = through_a_file(optim.state_dict())
    other = rai.L2BallOptim([parameter(2, 3)], epsilon=9.0)
    other.load_state_dict(saved)
    for name, value in options.items():
        assert (
            torch.equal(torch.as_tensor(other.param_groups[0][name] or 0), torch.as_tensor(value or 0))
            if (not isinstance(value, torch.Tensor) or value.ndim == 0)
            else torch.equal(other.param_groups[0][name], value)
        )


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_a_checkpoint_of_the_bare_inner_optimizer_loads_and_keeps_our_options(inner: Any) -> None:
    x, y = parameter(2, 3), parameter(2, 3)
    bare = inner([y], lr=0.25)
    step(bare, 1, 2)
    groups = [{"params": [x], "epsilon": 0.125}]
    optim = L2ProjectedOptim(groups, inner, lr=9.0, epsilon=1.0, grad_scale=2.0)
    optim.load_state_dict(copy.deepcopy(bare.state_dict()))
    group = optim.param_groups[0]
    assert (group["lr"], group["epsilon"], group["grad_scale"], group["param_ndim"]) == (0.25, 0.125, 2.0, -1)
    step(optim, 3)
    assert x.detach().norm(dim=1).max() <= 0.125 * (1 + 1e-6)


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_a_bare_checkpoint_loaded_into_the_inner_optimizer_leaves_the_wrapper_working(inner: Any) -> None:
    x = parameter(2, 3)
    optim = L2ProjectedOptim([x], inner, epsilon=0.25)
    bare = inner([parameter(2, 3)], lr=0.5)
    step(bare, 1)
    optim.inner_opt.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert optim.state_dict() == optim.inner_opt.state_dict()
    step(optim, 2)
    assert optim.param_groups[0]["epsilon"] == 0.25
    assert x.detach().norm(dim=1).max() <= 0.25 * (1 + 1e-6)


def test_each_group_keeps_its_options_when_the_inner_optimizer_loads_a_bare_checkpoint() -> None:
    bare = SGD([{"params": [parameter(2, 3)]}, {"params": [parameter(4, 3)]}], lr=0.5)
    groups = [{"params": [parameter(2, 3)], "epsilon": 0.5}, {"params": [parameter(4, 3)], "epsilon": 2.0}]
    optim = L2ProjectedOptim(groups, lr=0.1)
    for loaded in (optim, copy.deepcopy(optim), pickle.loads(pickle.dumps(optim))):
        loaded.inner_opt.load_state_dict(bare.state_dict())
        assert [group["epsilon"] for group in loaded.param_groups] == [0.5, 2.0]
        assert [group["lr"] for group in loaded.param_groups] == [0.5, 0.5]


def test_our_checkpoint_loads_into_the_bare_inner_optimizer() -> None:
    optim = L2NormedGradientOptim([parameter(2, 3)], Adam)
    step(optim, 1)
    bare = Adam([parameter(2, 3)])
    bare.load_state_dict(copy.deepcopy(optim.state_dict()))
    step(bare, 2)


def test_a_state_dict_is_taken_by_keyword_and_not_changed() -> None:
    optim = L2NormedGradientOptim([parameter(2, 3)], SGD)
    bare = SGD([parameter(2, 3)]).state_dict()
    before = copy.deepcopy(bare)
    optim.load_state_dict(state_dict=bare)
    assert bare == before


def test_a_state_dict_of_other_groups_is_refused() -> None:
    optim = L2NormedGradientOptim([parameter(2, 3)])
    other = L2NormedGradientOptim([parameter(2, 3), parameter(2, 3)])
    with pytest.raises(ValueError, match="size"):
        optim.load_state_dict(other.state_dict())
    step(optim, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_count_of_frank_wolfe_survives_loading_in_every_dtype(dtype: torch.dtype) -> None:
    x = parameter(2, 3).detach().to(dtype).requires_grad_()
    optim = L1FrankWolfe([x], epsilon=1.0)
    for _ in range(300):
        x.grad = torch.ones_like(x)
        optim.step()
    optim.load_state_dict(through_a_file(optim.state_dict()))
    assert optim.state[x]["step"].item() == 300


# torch.distributed.checkpoint asks for a state dict by a step with zero gradients and a learning rate of zero.


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 3, bias=False)
        self.second = torch.nn.Linear(3, 2, bias=False)


# Its default eps is 0 as a float16, so that the bare optimizer would divide 0 by 0.
STABLE_ADAMW = functools.partial(AdamW, eps=1e-3)


def cases_for_dcp() -> list[tuple[str, Any]]:
    makers: list[tuple[str, Any]] = [
        (
            f"{case.name} {'SGD' if inner is SGD else 'AdamW'}",
            functools.partial(case.build, InnerOpt=functools.partial(inner, lr=0.1)),
        )
        for case in ALL_CASES
        for inner in (SGD, STABLE_ADAMW)
    ]
    makers += [
        (
            f"chain {'SGD' if inner is SGD else 'AdamW'}",
            lambda params, inner=inner: ChainedParamTransformingOptimizer(
                SignedGradientOptim,
                functools.partial(ClampedParameterOptimizer, clamp_max=-5.0),
                params=params,
                InnerOpt=inner,
                grad_bias=3.0,
            ),
        )
        for inner in (SGD, STABLE_ADAMW)
    ]
    makers.append(("bare FrankWolfe", rai.FrankWolfe))
    return makers


@pytest.mark.parametrize(("name", "make"), cases_for_dcp(), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_asking_for_a_distributed_state_dict_changes_no_parameter_and_no_count(
    name: str, make: Any, dtype: torch.dtype
) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100)  # outside every ball
    before = [p.detach().clone() for p in model.parameters()]
    optim = make(list(model.parameters()))
    if isinstance(optim, ParamTransformingOptimizer):
        for group in optim.param_groups:
            group["grad_bias"] = 3.0
    state_dict = get_optimizer_state_dict(model, optim)
    assert all(map(torch.equal, before, model.parameters()))
    for entry in state_dict["state"].values():
        for key, value in entry.items():
            if key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") and value is not None and key != "step":
                assert not torch.as_tensor(value).any(), key
            if key == "step" and "FrankWolfe" in name:
                assert value == 0


def test_distributed_state_goes_round_with_options_and_state() -> None:
    def build(model: Net) -> Any:
        groups = [
            {"params": [model.first.weight], "epsilon": 0.5, "grad_scale": 2.0},
            {"params": [model.second.weight], "epsilon": 0.25},
        ]
        return L2ProjectedOptim(groups, Adam, lr=0.1, epsilon=1.0)

    torch.manual_seed(0)
    model, other = Net(), Net()
    optim = build(model)
    step(optim, 1, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optim))
    fresh = build(other)
    other.load_state_dict(model.state_dict())
    for group in fresh.param_groups:
        group.update(epsilon=9.0, grad_scale=9.0)
    set_optimizer_state_dict(other, fresh, saved)
    assert [(g["epsilon"], g["grad_scale"]) for g in fresh.param_groups] == [(0.5, 2.0), (0.25, 1.0)]
    step(optim, 3)
    step(fresh, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_flattened_distributed_state_dict_goes_round_for_a_chain() -> None:
    def build(model: Net) -> Any:
        return ChainedParamTransformingOptimizer(
            functools.partial(ClampedParameterOptimizer, clamp_max=0.5),
            functools.partial(ClampedParameterOptimizer, clamp_min=-0.25),
            params=model.parameters(),
            InnerOpt=Adam,
            lr=0.1,
        )

    torch.manual_seed(0)
    model = Net()
    optim = build(model)
    step(optim, 1)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optim, options=options))
    other = copy.deepcopy(model)
    fresh = build(other)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    step(optim, 2)
    step(fresh, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_zero_gradient_is_a_zero_update_in_every_dtype_also_with_a_learning_rate() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for cls in (rai.L1NormedGradientOptim, L2NormedGradientOptim, SignedGradientOptim):
            x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
            x.grad = torch.zeros(2, 3, dtype=dtype)
            cls([x], lr=1.0, grad_scale=1e4).step()
            assert torch.equal(x, torch.ones(2, 3, dtype=dtype))


def test_a_learning_rate_of_zero_alone_does_not_stop_the_transforms() -> None:
    x = torch.full((1, 4), 2.0, requires_grad=True)
    x.grad = torch.ones(1, 4)
    L2ProjectedOptim([x], lr=0.0, epsilon=1.0).step()
    torch.testing.assert_close(x.grad, torch.full((1, 4), 0.5))
    torch.testing.assert_close(x.detach(), torch.full((1, 4), 0.5))
