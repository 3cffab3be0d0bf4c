"""Options, hooks and inner optimizers at the edges of a step: what is refused, and what takes which way."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD

from rai_toolbox import optim as ro
from rai_toolbox.optim import _one_pass


def with_gradient(*shape: int) -> torch.Tensor:
    x = torch.ones(shape, requires_grad=True)
    x.grad = torch.full(shape, 2.0)
    return x


def test_a_plan_dies_with_its_group() -> None:
    x, y = with_gradient(2, 3), with_gradient(2, 3)
    optim = ro.L2NormedGradientOptim([{"params": [x]}, {"params": [y]}], lr=0.1)
    optim.step()
    gone = weakref.ref(y)
    del optim.param_groups[1], y
    optim.step()
    gc.collect()
    assert gone() is None


def test_an_optimizer_with_a_users_hook_is_freed_without_a_garbage_collection() -> None:
    class Own(ro.ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            assert param.grad is not None
            param.grad.sign_()

    optim = Own([with_gradient(2, 3)], lr=0.1)
    optim.step()
    gone = weakref.ref(optim)
    gc.disable()
    try:
        del optim
        assert gone() is None
    finally:
        gc.enable()


def test_a_hook_of_a_link_that_is_set_later_is_used() -> None:
    x = with_gradient(1, 2)
    chain = ro.ChainedParamTransformingOptimizer(ro.SignedGradientOptim, params=[x], lr=0.1)
    chain.step()
    chain._links[0]._pre_step_transform_ = lambda param, optim_group: param.grad.fill_(7.0)  # type: ignore
    chain.step()
    assert x.grad.tolist() == [[7.0, 7.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["nesterov", "momentum"])
def test_an_option_that_the_inner_optimizer_also_has_is_refused(name: str) -> None:
    class Own(ro.ParamTransformingOptimizer):
        def __init__(self, params: Any, InnerOpt: Any = SGD, *, nesterov: Any = 1, momentum: Any = 1, **keywords: Any):
            defaults = {name: {"nesterov": nesterov, "momentum": momentum}[name]}
            super().__init__(params, InnerOpt, defaults=defaults, **keywords)

    with pytest.raises(TypeError, match=rf"Own and SGD both have an option '{name}'"):
        Own([with_gradient(2)], lr=0.1)
    with pytest.raises(TypeError, match=rf"Own and SGD both have an option '{name}'"):
        ro.ChainedParamTransformingOptimizer(Own, params=[with_gradient(2)])


def test_frank_wolfe_takes_a_state_that_others_wrote_to_and_parameters_at_different_counts() -> None:
    x, y = with_gradient(2), with_gradient(2)
    optim = ro.FrankWolfe([x, y])
    optim.state[x]["note"] = 1
    optim.step()
    y.grad = None
    optim.step()
    y.grad = torch.full((2,), 2.0)
    optim.step()
    assert [optim.state[p]["step"].item() for p in (x, y)] == [3.0, 2.0]
    assert x.tolist() == y.tolist() == [-2.0, -2.0]


def test_a_hook_that_uses_the_state_of_a_view_is_refused_and_leaves_no_entry() -> None:
    class Own(ro.ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            self.state[param]["seen"] = 1

    optim = Own([with_gradient(2, 3)], lr=0.1)
    with pytest.raises(TypeError, match=r"Own\._pre_step_transform_ used `self.state\[param\]`"):
        optim.step()
    assert not optim.state
    optim.state_dict()


@pytest.mark.parametrize("how", ["int lr", "scheduler on inner_opt"])
def test_an_int_lr_and_a_scheduler_on_the_inner_optimizer_take_one_pass(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = ro.L2NormedGradientOptim([with_gradient(2, 3)], lr=1 if how == "int lr" else 1.0)
    scheduler = None if how == "int lr" else torch.optim.lr_scheduler.ExponentialLR(optim.inner_opt, 0.5)
    taken: list[bool] = []
    step = _one_pass.Blocks.step
    monkeypatch.setattr(_one_pass.Blocks, "step", lambda *args: (taken.append(True), step(*args)))
    optim.step()
    if scheduler is not None:
        scheduler.step()  # warns unless it was told of the step
    assert taken == [True]


def test_a_link_with_step_hooks_or_a_step_of_its_own_is_refused() -> None:
    class Hooked(ro.SignedGradientOptim):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.register_step_pre_hook(lambda *_: None)

    class Stepping(ro.SignedGradientOptim):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for link in (Hooked, Stepping):
        with pytest.raises(TypeError, match=rf"{link.__name__} cannot be a link of a chain: it overrides `step` or"):
            ro.ChainedParamTransformingOptimizer(link, params=[with_gradient(2, 3)])


def test_a_link_that_brings_its_own_inner_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="L2FrankWolfe cannot be a link of a chain: it takes no `InnerOpt`"):
        ro.ChainedParamTransformingOptimizer(partial(ro.L2FrankWolfe, epsilon=1.0), params=[with_gradient(2, 3)])


def test_an_integer_parameter_in_a_projection_is_refused() -> None:
    x = with_gradient(2, 3)
    counts = torch.ones(2, 3, dtype=torch.int64)
    optim = ro.L2ProjectedOptim([x, counts], epsilon=1.0)
    with pytest.raises(TypeError, match=r"L2ProjectedOptim transforms floating-point.*torch\.int64"):
        optim.step()


def test_numbers_of_numpy_are_numbers_and_are_kept_as_pythons() -> None:
    x = with_gradient(2, 3)
    optim = ro.L2ProjectedOptim(
        [x],
        epsilon=np.float32(0.5),
        lr=10.0,
        param_ndim=np.int64(-1),
        grad_scale=np.float64(2.0),  # type: ignore
    )
    assert {type(optim.param_groups[0][k]) for k in ("epsilon", "grad_scale")} == {float}
    optim.step()
    torch.testing.assert_close(x.detach().norm(dim=1), torch.full((2,), 0.5))
    optim.param_groups[0]["epsilon"] = np.float32(0.25)
    optim.step()
    torch.testing.assert_close(x.detach().norm(dim=1), torch.full((2,), 0.25))
    with pytest.raises(TypeError, match="epsilon"):
        ro.L2ProjectedOptim([x], epsilon=np.bool_(True))  # type: ignore[arg-type]
