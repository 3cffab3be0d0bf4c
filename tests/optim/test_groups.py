"""Options per group, `add_param_group` and its validation."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from optimizer_cases import ALL_CASES, Case, Idle
from torch.optim import SGD, Adam

from rai_toolbox import optim as rai
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L1NormedGradientOptim,
    L1qNormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    LpNormedGradientOptim,
    SignedGradientOptim,
    TopQGradientOptimizer,
)


def ones(*shape: int) -> torch.Tensor:
    p = torch.ones(*shape, requires_grad=True)
    p.grad = torch.arange(1.0, p.numel() + 1).view(shape)
    return p


PER_GROUP = [
    (L2NormedGradientOptim, {}, "param_ndim", -1, None),
    (L2NormedGradientOptim, {}, "grad_scale", 1.0, 3.0),
    (L2NormedGradientOptim, {}, "grad_bias", 0.0, 3.0),
    (L2NormedGradientOptim, {}, "div_by_zero_eps", 1e-30, 100.0),
    (LpNormedGradientOptim, {}, "p", 1, 3),
    (L2ProjectedOptim, {}, "epsilon", 0.5, 0.25),
    (L2ProjectedOptim, {}, "epsilon", 0.5, torch.tensor([0.25, 0.75])),
    (LinfProjectedOptim, {}, "epsilon", 0.5, 0.25),
    (TopQGradientOptimizer, {}, "q", 0.5, 0.75),
    (TopQGradientOptimizer, {"q": 0.5}, "dq", 0.0, 0.25),
    (ClampedGradientOptimizer, {}, "clamp_max", 1.5, 2.5),
    (ClampedParameterOptimizer, {}, "clamp_max", 0.5, 0.25),
    (rai.L1BallOptim, {"epsilon": 0.5}, "upper", 0.1, 0.01),
    (rai.SimplexOptim, {}, "total", 1.0, 2.0),
    (rai.L2FrankWolfe, {}, "epsilon", 0.5, 0.25),
    (rai.L2FrankWolfe, {"epsilon": 0.5, "use_default_lr_schedule": False}, "lr", 0.5, 0.25),
    (rai.L2FrankWolfe, {"epsilon": 0.5, "lr": 1.0}, "use_default_lr_schedule", True, False),
]


@pytest.mark.parametrize(("cls", "options", "name", "one", "other"), PER_GROUP)
def test_an_option_may_differ_per_group(cls: Any, options: dict[str, Any], name: str, one: Any, other: Any) -> None:
    def stepped(groups: list[dict[str, Any]]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        optim = cls(groups, **options)
        optim.step()
        return [t for g in optim.param_groups for p in g["params"] for t in (p.detach(), p.grad)]

    together = stepped([{"params": [ones(2, 4)], name: one}, {"params": [ones(2, 4)], name: other}])
    alone = stepped([{"params": [ones(2, 4)], name: one}])
    if name != "dq":
        alone += stepped([{"params": [ones(2, 4)], name: other}])
    for a, b in zip(together, alone, strict=False):
        assert torch.equal(a, b)
    added = cls([{"params": [ones(2, 4)], name: one}], **options)
    added.add_param_group({"params": [ones(2, 4)], name: other})
    torch.manual_seed(0)
    added.step()
    for a, p in zip(together[::2], [p for g in added.param_groups for p in g["params"]], strict=True):
        assert torch.equal(a, p.detach())


REFUSED = [
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": -1.0}, ValueError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": float("nan")}, ValueError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": "1"}, TypeError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": None}, TypeError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": torch.tensor([1.0, -1.0])}, ValueError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": torch.ones(3)}, ValueError),
    (L2ProjectedOptim, {"epsilon": 1.0}, {"div_by_zero_eps": -1.0}, ValueError),
    (LinfProjectedOptim, {"epsilon": 1.0}, {"epsilon": -1.0}, ValueError),
    (rai.L1BallOptim, {"epsilon": 1.0}, {"lower": "0"}, TypeError),
    (rai.SimplexOptim, {}, {"total": -1.0}, ValueError),
    (rai.L1FrankWolfe, {"epsilon": 1.0}, {"epsilon": -1.0}, ValueError),
    (rai.L1FrankWolfe, {"epsilon": 1.0}, {"lr": -1.0}, ValueError),
    (rai.L1FrankWolfe, {"epsilon": 1.0}, {"lr": 1.5, "use_default_lr_schedule": False}, ValueError),
    (rai.L1FrankWolfe, {"epsilon": 1.0}, {"use_default_lr_schedule": 1}, TypeError),
    (rai.FrankWolfe, {}, {"lmo_scaling_factor": "1"}, TypeError),
    (rai.FrankWolfe, {"lr": 1.0, "use_default_lr_schedule": False}, {"lr": 2.0}, ValueError),
    (L2NormedGradientOptim, {}, {"param_ndim": 3}, ValueError),
    (L2NormedGradientOptim, {}, {"param_ndim": 1.5}, TypeError),
    (L2NormedGradientOptim, {}, {"grad_scale": None}, TypeError),
    (L2NormedGradientOptim, {}, {"grad_scale": float("nan")}, ValueError),
    (L2NormedGradientOptim, {}, {"grad_bias": "0"}, TypeError),
    (LpNormedGradientOptim, {"p": 2}, {"p": 0.5}, ValueError),
    (TopQGradientOptimizer, {"q": 0.5}, {"q": 1.5}, ValueError),
    (TopQGradientOptimizer, {"q": 0.5}, {"q": -0.1}, ValueError),
    (TopQGradientOptimizer, {"q": 0.5}, {"dq": 2.0}, ValueError),
    (TopQGradientOptimizer, {"q": 0.5}, {"q": "0.5"}, TypeError),
    (L1qNormedGradientOptim, {"q": 0.5}, {"q": None}, TypeError),
    (rai.L1qFrankWolfe, {"q": 0.5, "epsilon": 1.0}, {"q": 7}, ValueError),
    (ClampedGradientOptimizer, {"clamp_max": 1.0}, {"clamp_min": 2.0}, ValueError),
    (ClampedGradientOptimizer, {"clamp_max": 1.0}, {"clamp_max": None}, ValueError),
    (ClampedParameterOptimizer, {"clamp_max": 1.0}, {"clamp_max": "1"}, TypeError),
]


def _parts(*options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for o in options for k, v in o.items())


@pytest.mark.parametrize(("cls", "options", "bad", "error"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_bad_option_is_refused_at_construction_and_by_add_param_group_which_then_adds_nothing(
    cls: Any, options: dict[str, Any], bad: dict[str, Any], error: type[Exception]
) -> None:
    name = next(iter(bad))
    with pytest.raises(error, match=name):
        cls([{"params": [ones(2, 3)], **bad}], **options)
    with pytest.raises(error, match=name):
        cls([ones(2, 3)], **{**options, **bad})
    optim = cls([ones(2, 3)], **options)
    with pytest.raises(error, match=name):
        optim.add_param_group({"params": [ones(2, 3)], **bad})
    assert len(optim.param_groups) == 1
    optim.step()


@pytest.mark.parametrize(("cls", "options", "bad", "error"), [r for r in REFUSED if "FrankWolfe" not in r[0].__name__])
def test_a_chain_validates_a_new_group_like_its_first_ones(
    cls: Any, options: dict[str, Any], bad: dict[str, Any], error: type[Exception]
) -> None:
    optim = ChainedParamTransformingOptimizer(functools.partial(cls, **options), params=[ones(2, 3)])
    with pytest.raises(error, match=next(iter(bad))):
        optim.add_param_group({"params": [ones(2, 3)], **bad})
    assert len(optim.param_groups) == 1
    with pytest.raises(error, match=next(iter(bad))):
        ChainedParamTransformingOptimizer(functools.partial(cls, **options), params=[{"params": [ones(2, 3)], **bad}])


def test_a_refused_construction_leaves_an_inner_instance_alone() -> None:
    sgd = SGD([ones(2, 3)])
    before = (dict(sgd.param_groups[0]), dict(sgd.defaults))
    with pytest.raises(ValueError, match="epsilon"):
        L2ProjectedOptim(None, sgd, epsilon=-1.0)
    assert (dict(sgd.param_groups[0]), dict(sgd.defaults)) == before


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.name)
def test_a_new_group_gets_the_defaults_of_every_option(case: Case) -> None:
    optim = case.build([ones(2, 3)])
    keys = optim.param_groups[0].keys()
    optim.add_param_group({"params": ones(3, 2)})
    assert optim.param_groups[1].keys() == keys
    assert {k: v for k, v in optim.param_groups[1].items() if k != "params"} == {
        k: v for k, v in optim.param_groups[0].items() if k != "params"
    }


@pytest.mark.parametrize("params", ["tensor", "list", "generator", "named"])
def test_a_new_group_may_hold_parameters_in_any_form(params: str) -> None:
    named = params == "named"
    optim = L2NormedGradientOptim([("w", ones(2, 3))] if named else [ones(2, 3)])
    p = ones(3, 2)
    form: Any = {"tensor": p, "list": [p], "generator": (q for q in [p]), "named": [("v", p)]}[params]
    optim.add_param_group({"params": form})
    assert optim.param_groups[1]["params"] == [p]


def test_torch_says_what_is_wrong_with_the_parameters_of_a_new_group() -> None:
    optim = L2NormedGradientOptim([x := ones(2, 3)])
    with pytest.raises(TypeError, match="dict"):
        optim.add_param_group([ones(2, 3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than one"):
        optim.add_param_group({"params": [x]})
    with pytest.raises(TypeError, match="Tensors"):
        optim.add_param_group({"params": ["x"]})
    with pytest.raises(TypeError, match="ordered"):
        optim.add_param_group({"params": {ones(2, 3)}})
    with pytest.raises(KeyError):
        optim.add_param_group({"lr": 1.0})
    assert len(optim.param_groups) == 1


def test_the_inner_optimizers_own_add_param_group_fills_in_our_options() -> None:
    optim = L2ProjectedOptim([ones(2, 3)], lr=1.0, epsilon=0.5)
    optim.inner_opt.add_param_group({"params": [p := ones(2, 3)]})
    optim.step()
    torch.testing.assert_close(p.detach().norm(dim=1), torch.full((2,), 0.5))


@pytest.mark.parametrize(("q", "dq", "low", "high"), [(0.5, 0.2, 0.3, 0.7), (0.1, 0.3, 0.0, 0.4), (0.9, 0.4, 0.5, 1.0)])
def test_a_positive_dq_draws_q_anew_uniformly_for_each_parameter_and_step(
    q: float, dq: float, low: float, high: float
) -> None:
    params = [torch.zeros(1, 1000, requires_grad=True) for _ in range(40)]
    optim = TopQGradientOptimizer(params, Idle, q=q, dq=dq, generator=torch.Generator().manual_seed(0))
    kept = []
    for _ in range(10):
        for p in params:
            p.grad = torch.randn(1, 1000)
        optim.step()
        kept += [int((p.grad != 0).sum()) for p in params]  # type: ignore[union-attr]
    shares = 1 - torch.tensor(kept) / 1000
    assert low <= shares.min() < low + 0.02
    assert high - 0.02 < shares.max() <= high
    assert abs(shares.mean() - (low + high) / 2) < 0.02


def test_a_positive_dq_draws_from_its_own_generator_and_a_zero_dq_from_none() -> None:
    before = torch.get_rng_state()
    for dq in (0.0, 0.3):
        draws = []
        for _ in range(2):
            p = torch.zeros(1, 1000, requires_grad=True)
            p.grad = torch.arange(1000.0).view(1, -1)
            gen = torch.Generator().manual_seed(5)
            state = gen.get_state()
            TopQGradientOptimizer([p], q=0.5, dq=dq, generator=gen).step()
            draws.append(p.grad)
            assert torch.equal(gen.get_state(), state) == (dq == 0)
        assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="generator"):
        TopQGradientOptimizer([ones(2, 3)], q=0.5, generator=3)  # type: ignore[arg-type]


def test_a_factory_may_have_a_parameter_named_like_an_option() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    scaled = L2NormedGradientOptim([x], lambda params, lr=0.1, grad_scale=2.0: SGD(params, lr=lr * grad_scale))
    assert (scaled.param_groups[0]["lr"], scaled.param_groups[0]["grad_scale"]) == (0.2, 1.0)
    nested = L2NormedGradientOptim(
        [x], lambda params, lr=0.1, param_ndim=1: L1NormedGradientOptim(params, lr=lr, param_ndim=param_ndim)
    )
    assert nested.inner_opt.param_groups[0]["param_ndim"] == 1


@pytest.mark.parametrize(
    "inner", [SGD, functools.partial(SGD), SignedGradientOptim, functools.partial(SignedGradientOptim, InnerOpt=Adam)]
)
def test_an_entry_of_defaults_reaches_the_inner_optimizer_whatever_lies_between(inner: Any) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    assert L2NormedGradientOptim([x], inner, lr=0.1, defaults={"lr": 0.5}).param_groups[0]["lr"] == 0.5


def test_an_entry_of_defaults_that_nothing_takes_is_an_error() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(TypeError, match=r"`defaults` cannot set 'lr'"):
        L2NormedGradientOptim([x], lambda params, **keywords: SGD(params, **keywords), defaults={"lr": 0.5})


def test_an_optimizer_that_was_wrapped_before_is_wrapped_again_with_the_same_options_only() -> None:
    inner = SGD([torch.zeros(2, 3, requires_grad=True)], lr=0.1)
    L2ProjectedOptim(None, inner, epsilon=0.5)
    assert L2ProjectedOptim(None, inner, epsilon=0.5).param_groups[0]["epsilon"] == 0.5
    with pytest.raises(ValueError, match=r"wrapped before, with epsilon=0\.5, which epsilon=9\.0"):
        L2ProjectedOptim(None, inner, epsilon=9.0)


def test_options_in_groups_beside_a_built_optimizer_are_an_error() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    inner = SGD([x], lr=0.1)
    with pytest.raises(ValueError, match="whose groups are used: set \\['div_by_zero_eps'\\]"):
        L2NormedGradientOptim([{"params": [x], "div_by_zero_eps": 7.0}], inner)
    L2NormedGradientOptim(inner.param_groups, inner)


def test_a_checkpoint_with_an_option_that_does_not_fit_is_not_loaded() -> None:
    optim = L2ProjectedOptim([torch.zeros(2, 3, requires_grad=True)], lr=0.1, epsilon=1.0)
    for name, value in (("param_ndim", 7), ("epsilon", -1.0)):
        state_dict = copy.deepcopy(optim.state_dict())
        state_dict["param_groups"][0][name] = value
        with pytest.raises(ValueError, match=name):
            optim.load_state_dict(state_dict)
        assert optim.param_groups[0][name] != value


def test_p_is_that_of_the_optimizer_and_not_of_one_inside() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    assert LpNormedGradientOptim([x], functools.partial(LpNormedGradientOptim, p=1.0), p=3.0).p == 3.0
