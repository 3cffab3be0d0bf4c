"""Frank-Wolfe: its steps, its state, and its rate on quadratics whose minimum is known."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from rai_toolbox.functional import project_l1_ball, project_l2_ball, project_linf_ball
from rai_toolbox.optim import FrankWolfe, L1FrankWolfe, L1qFrankWolfe, L2FrankWolfe, LinfFrankWolfe

BALLS = [
    (L1FrankWolfe, project_l1_ball, lambda d: 2.0),
    (L2FrankWolfe, project_l2_ball, lambda d: 2.0),
    (LinfFrankWolfe, project_linf_ball, lambda d: 2.0 * math.sqrt(d)),
]
DIM = 12


def target(where: str) -> torch.Tensor:
    """Minima of ‖x - target‖²/2 outside the ball, and well inside it."""
    point = torch.randn(3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return 3 * point if where == "outside" else point / point.abs().sum(1, keepdim=True) / 2


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(("cls", "project", "diameter"), BALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_distance_to_the_analytic_minimum_on_each_ball_falls_as_one_over_k(
    cls: Any, project: Any, diameter: Any, where: str
) -> None:
    b = target(where)
    best = project(b, 1.0)
    x = torch.zeros_like(b).requires_grad_()
    optim = cls([x], epsilon=1.0)
    gaps = []
    for k in range(1, 1001):
        optim.zero_grad()
        (x - b).square().sum().div(2).backward()
        optim.step()
        gap = ((x - b).square().sum(1) - (best - b).square().sum(1)).detach() / 2
        # f has curvature 1, so that the standard bound is 2 diameter² / (k + 2)
        assert (gap <= 2 * diameter(DIM) ** 2 / (k + 2)).all()
        assert (gap >= -1e-9).all()
        gaps.append(gap.max().item())
    rate = np.polyfit(np.log(np.arange(100, 1001)), np.log(np.maximum(gaps[99:], 1e-18)), 1)[0]
    assert rate < -0.8 or gaps[-1] < 1e-9  # faster still, where the ball is strongly convex


@pytest.mark.parametrize(("cls", "project", "diameter"), BALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_iterate_lies_in_the_ball_also_in_float16(cls: Any, project: Any, diameter: Any) -> None:
    p = {L1FrankWolfe: 1, L2FrankWolfe: 2, LinfFrankWolfe: math.inf}[cls]
    for dtype in (torch.float16, torch.float32):
        x = torch.full((2, 30), 50.0, dtype=dtype, requires_grad=True)  # a start outside is forgotten at once
        optim = cls([x], epsilon=0.7)
        for seed in range(50):
            x.grad = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optim.step()
            norm = torch.linalg.vector_norm(x.detach().double(), p, dim=1)
            assert (norm <= 0.7 * (1 + 8 * torch.finfo(dtype).eps)).all()


def test_l1q_frank_wolfe_with_one_entry_kept_is_l1_frank_wolfe() -> None:
    x, y = torch.zeros(2, 10, requires_grad=True), torch.zeros(2, 10, requires_grad=True)
    one, other = L1FrankWolfe([x], epsilon=2.0), L1qFrankWolfe([y], epsilon=2.0, q=0.9)
    for seed in range(5):
        g = torch.randn(2, 10, generator=torch.Generator().manual_seed(seed))
        x.grad, y.grad = g.clone(), g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(x, y)


def test_the_default_schedule_is_lr_over_lr_plus_k_and_the_scaling_factor_multiplies_the_oracle() -> None:
    x = torch.tensor([10.0], requires_grad=True)
    optim = FrankWolfe([x], lr=3.0, lmo_scaling_factor=2.0)
    value = 10.0
    for k in range(6):
        s = (-1.0) ** k
        x.grad = torch.tensor([-s])
        optim.step()
        a = 3.0 / (3.0 + k)
        value = (1 - a) * value + a * s * 2.0
        assert x.item() == pytest.approx(value, rel=1e-6)


def test_each_parameter_counts_its_own_updates() -> None:
    x, y = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optim = FrankWolfe([x, y])
    for i in range(4):
        x.grad = torch.tensor([-1.0])
        y.grad = torch.tensor([-1.0]) if i >= 2 else None
        optim.step()
    assert (optim.state[x]["step"].item(), optim.state[y]["step"].item()) == (4, 2)


@pytest.mark.parametrize("build", [FrankWolfe, functools.partial(L1FrankWolfe, epsilon=1.0)])
def test_a_learning_rate_of_zero_moves_nothing_and_advances_no_count(build: Any) -> None:
    x = torch.full((1, 2), 3.0, requires_grad=True)
    optim = build([x])
    x.grad = torch.tensor([[-1.0, 0.0]])
    optim.step()
    before, optim.param_groups[0]["lr"] = x.detach().clone(), 0.0
    for _ in range(3):
        x.grad = torch.tensor([[0.0, -1.0]])
        optim.step()
    assert torch.equal(x, before)
    assert optim.state[x]["step"].item() == 1
    optim.param_groups[0]["lr"] = 2.0
    x.grad = torch.tensor([[0.0, -1.0]])
    optim.step()
    torch.testing.assert_close(x.detach(), before / 3 + torch.tensor([[0.0, 2 / 3]]))


@pytest.mark.parametrize("lr", [-0.1, 1.1, float("nan"), float("inf")])
def test_without_the_schedule_lr_must_be_in_0_1(lr: float) -> None:
    for build in (FrankWolfe, functools.partial(L2FrankWolfe, epsilon=1.0)):
        with pytest.raises(ValueError, match="lr"):
            build([torch.zeros(2, 2, requires_grad=True)], lr=lr, use_default_lr_schedule=False)
    with pytest.raises(TypeError, match="lr"):
        FrankWolfe([torch.zeros(2, requires_grad=True)], lr="2")  # type: ignore[arg-type]


def test_a_closure_is_evaluated_once_with_gradients_enabled() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    calls = []
    for optim in (L2FrankWolfe([x], epsilon=1.0), FrankWolfe([x])):

        def closure(optim: Any = optim) -> torch.Tensor:
            calls.append(1)
            optim.zero_grad()
            loss = (x - 1).square().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            assert isinstance(optim.step(closure), torch.Tensor)
    assert len(calls) == 2


def test_no_gradient_no_update() -> None:
    x = torch.full((2, 3), 5.0, requires_grad=True)
    optim = L1FrankWolfe([x], epsilon=1.0)
    optim.step()
    assert torch.equal(x, torch.full((2, 3), 5.0))
    assert not optim.state


def test_radii_per_datum_of_any_batch_shape() -> None:
    for epsilon, param_ndim in ((torch.tensor([[0.5, 1.0, 2.0]] * 2), 1), (torch.rand(6), 1), (torch.tensor(0.5), -1)):
        x = torch.zeros(2, 3, 4, requires_grad=True)
        x.grad = torch.randn(2, 3, 4)
        LinfFrankWolfe([x], epsilon=epsilon, param_ndim=param_ndim).step()
        radius = epsilon.reshape(2, 3, 1) if epsilon.numel() == 6 else epsilon
        torch.testing.assert_close(x.detach().abs(), radius.expand(2, 3, 4) if radius.ndim else torch.full_like(x, 0.5))


def test_repr_names_frank_wolfe() -> None:
    assert repr(L1FrankWolfe([torch.zeros(1, 2, requires_grad=True)], epsilon=1.0)).startswith("L1FrankWolfe [")
    assert repr(FrankWolfe([torch.zeros(2, requires_grad=True)])).startswith("FrankWolfe (")


def test_its_state_goes_round() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    optim = L2FrankWolfe([x], epsilon=1.0)
    for _ in range(3):
        x.grad = torch.ones(1, 3)
        optim.step()
    y = x.detach().clone().requires_grad_()
    other = L2FrankWolfe([y], epsilon=9.0)
    other.load_state_dict(copy.deepcopy(optim.state_dict()))
    for p, o in ((x, optim), (y, other)):
        p.grad = torch.tensor([[1.0, 0.0, 0.0]])
        o.step()
    assert torch.equal(x, y)
