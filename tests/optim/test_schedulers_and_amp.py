"""Learning-rate schedulers and gradient scalers, on the wrapper and on what it wraps."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, lr_scheduler, swa_utils

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    FrankWolfe,
    JointOptimizer,
    L2FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    OrthogonalizedGradientOptim,
    ParamTransformingOptimizer,
    SphereOptim,
)


def chained(optim: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optim, 0.5, 2), lr_scheduler.ExponentialLR(optim, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optim)


def in_sequence(optim: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optim, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optim, 0.9)]
    return lr_scheduler.SequentialLR(optim, parts, milestones=[3])


# Each scheduler of torch but ReduceLROnPlateau, which takes a figure and has a test of its own.
SCHEDULERS = [
    functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    functools.partial(lr_scheduler.CosineAnnealingLR, T_max=20),
    functools.partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=10),
    functools.partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=3),
    functools.partial(lr_scheduler.LinearLR, start_factor=0.1),
    functools.partial(lr_scheduler.ExponentialLR, gamma=0.9),
    functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda epoch: 0.9),
    functools.partial(lr_scheduler.MultiStepLR, milestones=[2, 4]),
    functools.partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=3),
    functools.partial(lr_scheduler.PolynomialLR, total_iters=8),
    functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    functools.partial(swa_utils.SWALR, swa_lr=0.05, anneal_epochs=3),
    chained,
    in_sequence,
]


def parameter() -> torch.Tensor:
    return torch.full((1, 2), 3.0, requires_grad=True)


def run(optim: torch.optim.Optimizer, schedule: Any, x: torch.Tensor, normalize: bool) -> torch.Tensor:
    path = []
    for i in range(6):
        x.grad = torch.tensor([[3.0, float(i)]])
        if normalize:
            x.grad /= x.grad.norm()
        optim.step()
        schedule.step()
        path.append(x.detach().clone())
    return torch.stack(path)


# SequentialLR of torch 2.6 uses what it deprecates.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("on", ["outer", "inner"])
@pytest.mark.parametrize("make", SCHEDULERS, ids=lambda s: getattr(s, "func", s).__name__)
def test_a_scheduler_on_the_wrapper_or_on_the_inner_optimizer_works(make: Any, on: str) -> None:
    x, y = parameter(), parameter()
    optim = L2NormedGradientOptim([x], SGD, lr=0.2, momentum=0.5)
    path = run(optim, make(optim if on == "outer" else optim.inner_opt), x, normalize=False)
    bare = SGD([y], lr=0.2, momentum=0.5)
    torch.testing.assert_close(path, run(bare, make(bare), y, normalize=True))
    assert len(path.unique(dim=0)) == 6


def test_a_scheduler_finds_out_that_it_was_called_before_the_optimizer() -> None:
    optim = L2NormedGradientOptim([parameter()], lr=0.1)
    schedule = lr_scheduler.StepLR(optim, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()


def test_reduce_on_plateau_writes_the_learning_rate() -> None:
    optim = L2NormedGradientOptim([parameter()], lr=1.0)
    schedule = lr_scheduler.ReduceLROnPlateau(optim, patience=0)
    for _ in range(3):
        optim.step()
        schedule.step(1.0)
    assert optim.inner_opt.param_groups[0]["lr"] < 1.0


def test_a_scheduled_optimizer_can_be_copied_and_checkpointed() -> None:
    x = parameter()
    optim = L2NormedGradientOptim([x], lr=1.0)
    schedule = lr_scheduler.ExponentialLR(optim, 0.5)
    run(optim, schedule, x, normalize=False)
    other = copy.deepcopy(optim)
    assert other.param_groups[0]["lr"] == optim.param_groups[0]["lr"] == 0.5**6
    again = lr_scheduler.ExponentialLR(optim, 0.5)
    again.load_state_dict(schedule.state_dict())
    assert again.get_last_lr() == schedule.get_last_lr()


def test_a_learning_rate_may_be_a_tensor_also_one_of_zero() -> None:
    x = parameter()
    optim = L2ProjectedOptim([x], Adam, lr=torch.tensor(0.1), epsilon=1.0)
    optim.param_groups[0]["lr"].fill_(0.0)
    x.grad = torch.zeros(1, 2)
    optim.step()
    assert torch.equal(x, parameter())
    x.grad.fill_(2.0)
    optim.step()
    torch.testing.assert_close(x.detach().norm(), torch.tensor(1.0))


@pytest.mark.parametrize("build", [FrankWolfe, functools.partial(L2FrankWolfe, epsilon=1.0)])
def test_a_scheduled_frank_wolfe_uses_the_scheduled_step_size(build: Any) -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    optim = build([x], lr=1.0, use_default_lr_schedule=False)
    schedule = lr_scheduler.ExponentialLR(optim, 0.5)
    for size in (1.0, 0.5, 0.25):
        before, x.grad = x.detach().clone(), torch.tensor([[0.0, 1.0]])
        optim.step()
        schedule.step()
        torch.testing.assert_close(x.detach(), (1 - size) * before + size * torch.tensor([[0.0, -1.0]]))
    optim.param_groups[0]["lr"] = 1.5
    with pytest.raises(ValueError, match="lr"):
        optim.step()


# Gradient scalers.


@pytest.mark.parametrize("inner", [SGD, functools.partial(SGD, fused=True), functools.partial(Adam, fused=True)])
@pytest.mark.parametrize(
    "build",
    [
        L2NormedGradientOptim,
        functools.partial(L2ProjectedOptim, epsilon=100.0),
        lambda params, inner, **kw: ChainedParamTransformingOptimizer(
            functools.partial(ClampedGradientOptimizer, clamp_max=1.0), params=params, InnerOpt=inner, **kw
        ),
        functools.partial(AveragedGradientOptim, decay=0.5, mix=0.7),
        functools.partial(OrthogonalizedGradientOptim, steps=None),
        functools.partial(SphereOptim, epsilon=2.0),
        lambda params, inner, **kw: JointOptimizer(AveragedGradientOptim(params, inner, **kw)),
    ],
)
def test_a_grad_scaler_unscales_before_the_transforms_and_skips_a_step_with_an_infinity(build: Any, inner: Any) -> None:
    x, y = parameter(), parameter()
    scaled, plain = build([x], inner, lr=0.1, grad_bias=0.25), build([y], inner, lr=0.1, grad_bias=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(3):
        for p, optim in ((x, scaled), (y, plain)):
            optim.zero_grad()
            loss = (p * torch.tensor([[3.0, 1.0 + i]])).sum()
            (scaler.scale(loss) if optim is scaled else loss).backward()
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert torch.equal(x, y)
        assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    before = [v.clone() for v in (x.detach(), *scaled.state[x].values()) if v is not None]
    x.grad = torch.tensor([[math.inf, 1.0]])
    scaler.step(scaled)
    scaler.update()
    now = [v for v in (x.detach(), *scaled.state[x].values()) if v is not None]
    assert all(map(torch.equal, now, before))
    assert scaler.get_scale() == 512.0


def test_gradients_that_were_unscaled_by_hand_are_not_unscaled_again() -> None:
    x = parameter()
    optim = ParamTransformingOptimizer([x], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(x.sum()).backward()
    scaler.unscale_(optim)
    torch.nn.utils.clip_grad_value_([x], 0.5)
    scaler.step(optim)
    assert x.tolist() == [[2.5, 2.5]]
