"""Several links on one inner optimizer: order, options of each link, every pair of classes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from optimizer_cases import CASES, Case, values
from torch.optim import SGD, Adam

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L1NormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

LINKS = [case for case in CASES if not case.name.endswith((" 0", "FrankWolfe")) or case.name == "L2Projected 0"]


def start(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = values(shape, dtype, "normal", 1).requires_grad_()
    x.grad = values(shape, dtype, "normal", 2)
    return x


def through(links: list[Any], g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The transforms of the links by hand, one optimizer after the other, around one step of SGD."""
    for link in links:
        p = x.detach().clone().requires_grad_()
        p.grad = g
        optim = link([p], SGD, lr=1.0)
        optim._transform_gradients()
    p = x.detach().clone().requires_grad_()
    p.grad = g
    SGD([p], lr=0.5).step()
    for link in links:
        link([p], SGD, lr=1.0)._transform_parameters()
    return g, p.detach()


@pytest.mark.parametrize("second", LINKS, ids=lambda c: c.name)
@pytest.mark.parametrize("first", LINKS, ids=lambda c: c.name)
def test_a_chain_of_two_is_the_two_applied_by_hand(first: Case, second: Case) -> None:
    links = [functools.partial(c.cls, **c.options) for c in (first, second)]
    for dtype in (torch.float16, torch.float32):
        x = start(3, 12, dtype=dtype)
        by_hand = through([functools.partial(link, param_ndim=-1) for link in links], x.grad.clone(), x)
        chain = ChainedParamTransformingOptimizer(*links, params=[x], lr=0.5, param_ndim=-1)
        chain.step()
        assert torch.equal(x.grad, by_hand[0])
        assert torch.equal(x.detach(), by_hand[1])


def test_links_act_left_to_right_before_and_after_the_step() -> None:
    order: list[str] = []

    def noting(name: str) -> type:
        def pre(self: Any, param: torch.Tensor, optim_group: Any) -> None:
            order.append(f"pre {name}")

        def post(self: Any, param: torch.Tensor, optim_group: Any) -> None:
            order.append(f"post {name}")

        return type(name, (ParamTransformingOptimizer,), {"_pre_step_transform_": pre, "_post_step_transform_": post})

    ChainedParamTransformingOptimizer(noting("a"), noting("b"), noting("c"), params=[start(1, 2)]).step()
    assert order == ["pre a", "pre b", "pre c", "post a", "post b", "post c"]


@pytest.mark.parametrize("link", [3, "L2NormedGradientOptim", SGD, functools.partial(SGD, lr=1.0), lambda p: None])
def test_a_link_that_is_no_class_and_no_partial_of_one_is_a_type_error(link: Any) -> None:
    with pytest.raises(TypeError, match="link"):
        ChainedParamTransformingOptimizer(link, params=[start(1, 2)])


def test_an_instance_is_no_link() -> None:
    with pytest.raises(TypeError, match="link"):
        ChainedParamTransformingOptimizer(SignedGradientOptim([start(1, 2)]), params=[start(1, 2)])


def test_a_link_that_lacks_its_required_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        ChainedParamTransformingOptimizer(L2ProjectedOptim, params=[start(1, 2)])


def test_an_option_that_groups_or_defaults_give_reaches_the_link() -> None:
    for params, more in (
        ([{"params": [x := start(2, 3)], "epsilon": 0.25}], {}),
        ([x := start(2, 3)], {"defaults": {"epsilon": 0.25}}),
    ):
        optim = ChainedParamTransformingOptimizer(L2ProjectedOptim, params=params, lr=1.0, **more)
        optim.step()
        x = optim.param_groups[0]["params"][0]
        torch.testing.assert_close(x.detach().norm(dim=1), torch.full((2,), 0.25))


def test_the_chains_scale_and_bias_come_once_and_last() -> None:
    x = start(1, 2)
    x.grad = torch.tensor([[3.0, 4.0]])
    optim = ChainedParamTransformingOptimizer(
        L2NormedGradientOptim,
        functools.partial(ClampedGradientOptimizer, clamp_max=0.7),
        params=[x],
        grad_scale=10,
        grad_bias=1,
        lr=1.0,
    )
    optim.step()
    torch.testing.assert_close(x.grad, torch.tensor([[7.0, 8.0]]))


def test_a_scale_in_a_partial_applies_right_after_that_link() -> None:
    x = start(1, 2)
    x.grad = torch.tensor([[3.0, 4.0]])
    optim = ChainedParamTransformingOptimizer(
        functools.partial(L2NormedGradientOptim, grad_scale=10.0, grad_bias=0.5),
        functools.partial(ClampedGradientOptimizer, clamp_max=7.0),
        params=[x],
        grad_scale=2,
        lr=1.0,
    )
    optim.step()
    torch.testing.assert_close(x.grad, torch.tensor([[13.0, 14.0]]))


def test_links_have_the_chains_param_ndim_unless_they_have_their_own() -> None:
    x = start(2, 3, 4)
    g = x.grad.clone()
    ChainedParamTransformingOptimizer(L2NormedGradientOptim, params=[x], param_ndim=1, lr=1.0).step()
    torch.testing.assert_close(x.grad.norm(dim=-1), torch.ones(2, 3))
    x.grad = g.clone()
    ChainedParamTransformingOptimizer(
        functools.partial(L1NormedGradientOptim, param_ndim=1),
        functools.partial(L2NormedGradientOptim, param_ndim=None),
        params=[x],
        lr=1.0,
    ).step()
    expected = g / g.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(x.grad, expected / expected.norm())


def test_an_option_of_a_second_link_of_the_same_name_has_a_key_of_its_own_that_can_be_set_per_group() -> None:
    x = start(1, 2)
    optim = ChainedParamTransformingOptimizer(
        functools.partial(ClampedParameterOptimizer, clamp_max=5.0),
        functools.partial(ClampedParameterOptimizer, clamp_max=4.0),
        params=[x],
    )
    key = "ClampedParameterOptimizer.clamp_max"
    assert (optim.param_groups[0]["clamp_max"], optim.param_groups[0][key]) == (5.0, 4.0)
    optim.add_param_group({"params": [y := torch.full((2,), 9.0, requires_grad=True)], "param_ndim": None, key: 2.0})
    optim.step()
    assert y.tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match="clamp_max"):
        optim.add_param_group({"params": [start(1, 2)], key: "2"})


def test_three_alike_links_keep_apart() -> None:
    x = torch.full((1, 3), 9.0, requires_grad=True)
    x.grad = torch.tensor([[-9.0, 0.0, 9.0]])
    optim = ChainedParamTransformingOptimizer(
        functools.partial(ClampedGradientOptimizer, clamp_min=-3.0, clamp_max=5.0),
        functools.partial(ClampedGradientOptimizer, clamp_min=-2.0, clamp_max=6.0),
        functools.partial(ClampedGradientOptimizer, clamp_min=-4.0, clamp_max=3.0),
        params=[x],
    )
    optim.step()
    assert x.grad.tolist() == [[-2.0, 0.0, 3.0]]
    assert repr(optim).startswith(" ○ ".join(["ClampedGradientOptimizer"] * 3) + " [SGD](")


def test_a_chain_of_no_links_steps_plainly() -> None:
    x, y = start(1, 2), start(1, 2)
    ChainedParamTransformingOptimizer(params=[x], lr=1.0).step()
    SGD([y], lr=1.0).step()
    assert torch.equal(x, y)


def test_a_chain_may_be_a_link_with_options_of_its_own() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    x.grad = torch.tensor([[-9.0, 0.5, 9.0]])
    inner = functools.partial(
        ChainedParamTransformingOptimizer,
        functools.partial(ClampedGradientOptimizer, clamp_min=-1.0),
        functools.partial(ClampedParameterOptimizer, clamp_min=-0.25),
    )
    optim = ChainedParamTransformingOptimizer(
        functools.partial(ClampedGradientOptimizer, clamp_max=2.0), inner, params=[x], lr=1.0
    )
    optim.step()
    assert x.grad.tolist() == [[-1.0, 0.5, 2.0]]
    assert x.tolist() == [[1.0, -0.25, -0.25]]
    assert {"clamp_min", "clamp_max"} <= optim.param_groups[0].keys()


def test_the_scale_and_param_ndim_of_a_chain_within_a_chain_hold_within() -> None:
    x = torch.zeros(2, 2, requires_grad=True)
    x.grad = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    chain = ChainedParamTransformingOptimizer
    inner = functools.partial(chain, L2NormedGradientOptim, param_ndim=1, grad_scale=10.0)
    chain(inner, functools.partial(ClampedGradientOptimizer, clamp_max=7.0), params=[x], param_ndim=None).step()
    torch.testing.assert_close(x.grad, torch.tensor([[6.0, 7.0], [6.0, 7.0]]))
    with pytest.raises(TypeError, match="link of a chain"):
        chain(functools.partial(chain, SignedGradientOptim, defaults={"lr": 1.0}), params=[x])


def test_a_users_class_is_a_link_and_its_options_are_its_own() -> None:
    class Times(ParamTransformingOptimizer):
        def __init__(self, params: Any, InnerOpt: Any = SGD, *, k: float, **kwargs: Any) -> None:
            super().__init__(params, InnerOpt, defaults={"k": k}, **kwargs)

        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            param.grad.mul_(optim_group["k"])  # type: ignore[union-attr]

    x = torch.zeros(1, 2, requires_grad=True)
    x.grad = torch.ones(1, 2)
    optim = ChainedParamTransformingOptimizer(
        functools.partial(Times, k=3.0), functools.partial(Times, k=5.0), params=[x], InnerOpt=Adam
    )
    optim.step()
    assert x.grad.tolist() == [[15.0, 15.0]]
    assert sorted(v for k, v in optim.param_groups[0].items() if k.endswith("k")) == [3.0, 5.0]


def test_a_subclass_of_a_chain_that_calls_super_applies_every_link() -> None:
    class Mine(ChainedParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            super()._pre_step_transform_(param=param, optim_group=optim_group)

        def _post_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            super()._post_step_transform_(param=param, optim_group=optim_group)

    results = []
    for cls in (ChainedParamTransformingOptimizer, Mine):
        x = start(3, 8)
        cls(
            functools.partial(TopQGradientOptimizer, q=0.5),
            functools.partial(L2NormedGradientOptim, grad_scale=2.0),
            functools.partial(L2ProjectedOptim, epsilon=0.5),
            params=[x],
            lr=0.5,
        ).step()
        results.append((x.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_what_the_class_of_a_link_fixes_holds_in_a_chain() -> None:
    class Ascent(L2NormedGradientOptim):
        def __init__(self, params: Any, InnerOpt: Any = SGD, **options: Any) -> None:
            super().__init__(params, InnerOpt, grad_scale=-1.0, param_ndim=1, **options)

    x = torch.zeros(1, 1, 2, requires_grad=True)
    chain = ChainedParamTransformingOptimizer(Ascent, params=[x], lr=1.0, param_ndim=None)
    x.grad = torch.tensor([[[3.0, 4.0]]])
    chain.step()
    torch.testing.assert_close(x.detach(), torch.tensor([[[0.6, 0.8]]]))
    assert chain.param_groups[0]["Ascent.param_ndim"] == 1


def test_an_option_of_the_inner_optimizer_is_given_to_the_chain() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"SignedGradientOptim has no option 'lr'.*given to the chain"):
        ChainedParamTransformingOptimizer(functools.partial(SignedGradientOptim, lr=0.1), params=[x])
