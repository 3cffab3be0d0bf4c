"""What an older implementation of this API got wrong, one test per defect (as reproduced on torch 2.13)."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L1FrankWolfe,
    L1NormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    SignedGradientOptim,
    TopQGradientOptimizer,
)


def transformed(build: Any, g: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(g).requires_grad_()
    x.grad = g.clone()
    build([x], lr=1.0).step()
    assert not x.isnan().any()
    return x.grad


@pytest.mark.parametrize("cls", [L1NormedGradientOptim, L2NormedGradientOptim])
def test_a_float16_zero_gradient_normed_is_zero_not_nan(cls: Any) -> None:
    assert torch.equal(transformed(cls, torch.zeros(2, 5, dtype=torch.float16)), torch.zeros(2, 5).half())


@pytest.mark.parametrize(
    ("entry", "dtype"), [(6e4, torch.float16), (1e20, torch.float32), (3e38, torch.float32), (3e38, torch.bfloat16)]
)
def test_large_entries_are_normed_to_one_not_to_zero(entry: float, dtype: torch.dtype) -> None:
    g = transformed(L2NormedGradientOptim, torch.full((2, 4), entry, dtype=dtype))
    assert torch.equal(g, torch.full((2, 4), 0.5, dtype=dtype))


@pytest.mark.parametrize("entry", [1e-30, 1e-38, 1e-45])
def test_small_entries_are_normed_to_one_not_to_a_huge_number(entry: float) -> None:
    build = functools.partial(L2NormedGradientOptim, div_by_zero_eps=0.0)
    assert torch.equal(transformed(build, torch.full((2, 4), entry)), torch.full((2, 4), 0.5))


def test_a_float16_l1_norm_of_a_hundred_thousand_ones_does_not_overflow() -> None:
    g = transformed(L1NormedGradientOptim, torch.ones(1, 100_000, dtype=torch.float16))
    assert torch.equal(g, torch.full_like(g, 1e-5))
    assert abs(g.double().sum().item() - 1) < 2e-3  # the rounding of 1e-5 as a float16


def test_a_float16_parameter_projected_on_a_small_ball_is_on_the_ball_not_nan() -> None:
    x = torch.tensor([[0.6, 0.8]], dtype=torch.float16, requires_grad=True)
    x.grad = torch.zeros(1, 2, dtype=torch.float16)
    L2ProjectedOptim([x], lr=1.0, epsilon=1e-4).step()
    torch.testing.assert_close(x.detach(), torch.tensor([[6e-5, 8e-5]]).half(), rtol=0, atol=6e-8)


def test_parameter_entries_of_1e20_are_projected_on_the_ball_not_to_zero() -> None:
    x = torch.full((1, 4), 1e20, requires_grad=True)
    x.grad = torch.zeros(1, 4)
    L2ProjectedOptim([x], lr=1.0, epsilon=1.0).step()
    assert torch.equal(x.detach(), torch.full((1, 4), 0.5))


def test_a_channels_last_parameter_works_with_param_ndim_1() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    x.grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    L2ProjectedOptim([x], lr=1.0, epsilon=0.5, param_ndim=1).step()
    torch.testing.assert_close(x.grad.norm(dim=-1), torch.ones(2, 3, 4))
    assert x.detach().norm(dim=-1).max() <= 0.5 * (1 + 1e-6)


def test_l1_frank_wolfe_on_images_moves_one_entry_of_each() -> None:
    x = torch.zeros(4, 3, 5, 5, requires_grad=True)
    x.grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    L1FrankWolfe([x], epsilon=1.0).step()
    assert (x != 0).flatten(1).sum(1).tolist() == [1] * 4
    assert x.detach().abs().flatten(1).sum(1).tolist() == [1.0] * 4


def test_the_l1_oracle_puts_ties_on_one_entry_and_stays_in_the_ball() -> None:
    x = torch.zeros(3, 6, requires_grad=True)
    x.grad = torch.tensor([1.0, -1.0, 0.0])[:, None].expand(3, 6).clone()
    L1FrankWolfe([x], epsilon=2.0).step()
    assert (x != 0).sum(1).max() == 1
    assert x.detach().abs().sum(1).max() == 2.0


@pytest.mark.parametrize("cls", [L2ProjectedOptim, TopQGradientOptimizer, L1FrankWolfe])
def test_leaving_out_epsilon_or_q_is_a_type_error_not_a_silent_default(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"epsilon|`q`"):
        cls([torch.zeros(2, 3, requires_grad=True)])


@pytest.mark.parametrize("bad", [{"epsilon": -1.0}, {"param_ndim": 5}])
def test_add_param_group_refuses_a_negative_epsilon_or_a_bad_param_ndim_and_adds_nothing(bad: dict[str, Any]) -> None:
    optim = L2ProjectedOptim([torch.zeros(2, 3, requires_grad=True)], epsilon=1.0)
    with pytest.raises(ValueError, match=next(iter(bad))):
        optim.add_param_group({"params": [torch.zeros(2, 3, requires_grad=True)], **bad})
    assert len(optim.param_groups) == 1


def test_the_callers_defaults_are_untouched_and_do_not_leak_into_the_next_optimizer() -> None:
    defaults = {"grad_scale": 2.0}
    L2ProjectedOptim([torch.zeros(2, 3, requires_grad=True)], epsilon=1.0, defaults=defaults)
    assert defaults == {"grad_scale": 2.0}
    with pytest.raises(TypeError, match="epsilon"):
        L2ProjectedOptim([torch.zeros(2, 3, requires_grad=True)], defaults=defaults)  # type: ignore[call-arg]


def test_div_by_zero_eps_is_per_group_and_in_the_state_dict() -> None:
    groups = [{"params": [torch.zeros(1, 2, requires_grad=True)], "div_by_zero_eps": eps} for eps in (10.0, 100.0)]
    optim = L2NormedGradientOptim(groups, lr=1.0)
    for group in optim.param_groups:
        group["params"][0].grad = torch.tensor([[3.0, 4.0]])
    optim.step()
    grads = [g["params"][0].grad for g in optim.param_groups]
    torch.testing.assert_close(grads, [torch.tensor([[0.3, 0.4]]), torch.tensor([[0.03, 0.04]])])
    assert [g["div_by_zero_eps"] for g in optim.state_dict()["param_groups"]] == [10.0, 100.0]


def test_two_clamps_in_one_chain_keep_their_own_bounds() -> None:
    x = torch.zeros(3, requires_grad=True)
    x.grad = torch.tensor([-5.0, 0.5, 5.0])
    ChainedParamTransformingOptimizer(
        functools.partial(ClampedGradientOptimizer, clamp_min=-2.0),
        functools.partial(ClampedGradientOptimizer, clamp_max=3.0),
        functools.partial(ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0),
        params=[x],
        lr=1.0,
    ).step()
    assert x.grad.tolist() == [-2.0, 0.5, 3.0]
    assert x.tolist() == [1.0, -0.5, -1.0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optim: pickle.loads(pickle.dumps(optim))])
def test_deepcopy_and_pickle_work(way: Any) -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    other = way(L2ProjectedOptim([x], lr=1.0, epsilon=0.5))
    y = other.param_groups[0]["params"][0]
    y.grad = torch.tensor([[-3.0, -4.0]])
    other.step()
    torch.testing.assert_close(y.detach(), torch.tensor([[0.3, 0.4]]))
    assert x.tolist() == [[0.0, 0.0]]


def test_sparse_gradients_work_for_norm_sign_and_clamp() -> None:
    for build in (
        functools.partial(L2NormedGradientOptim, param_ndim=None),
        SignedGradientOptim,
        functools.partial(ClampedGradientOptimizer, clamp_max=1.0),
    ):
        x = torch.zeros(3, 2, requires_grad=True)
        x.grad = torch.tensor([[0.0, 0.0], [3.0, -4.0], [0.0, 0.0]]).to_sparse()
        build([x], lr=1.0).step()
        assert x.grad.is_sparse
        assert x.detach()[1, 1] > 0


def test_sparse_gradients_are_a_clear_type_error_for_a_selection_over_the_whole_tensor() -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    x.grad = torch.tensor([[0.0, 0.0], [3.0, -4.0], [0.0, 0.0]]).to_sparse()
    with pytest.raises(TypeError, match=r"sparse gradient.*param_ndim"):
        TopQGradientOptimizer([x], q=0.5, param_ndim=None).step()
