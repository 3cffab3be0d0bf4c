"""torch's six kinds of optimizer hooks, on the outer and on the inner optimizer."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    L2NormedGradientOptim,
    ParamTransformingOptimizer,
)

MAKERS = [
    L2NormedGradientOptim,
    lambda params, **kw: ChainedParamTransformingOptimizer(
        L2NormedGradientOptim, functools.partial(ClampedGradientOptimizer, clamp_max=9.0), params=params, **kw
    ),
]


def fresh() -> torch.Tensor:
    x = torch.zeros(1, 2, requires_grad=True)
    x.grad = torch.tensor([[3.0, 4.0]])
    return x


@pytest.mark.parametrize("make", MAKERS)
def test_outer_step_hooks_see_raw_gradients_inner_ones_transformed_and_each_fires_once(make: Any) -> None:
    x = fresh()
    optim = make([x], lr=1.0)
    seen: list[tuple[str, float]] = []

    def note(name: str) -> Any:
        return lambda opt, args, kwargs: seen.append((name, round(x.grad.norm().item(), 3)))  # type: ignore[union-attr]

    optim.register_step_pre_hook(note("outer pre"))
    optim.register_step_post_hook(note("outer post"))
    optim.inner_opt.register_step_pre_hook(note("inner pre"))
    optim.inner_opt.register_step_post_hook(note("inner post"))
    optim.step()
    assert seen == [("outer pre", 5.0), ("inner pre", 1.0), ("inner post", 1.0), ("outer post", 1.0)]


@pytest.mark.parametrize("make", MAKERS)
def test_an_inner_step_hook_runs_also_for_plain_sgd_and_may_change_the_gradient(make: Any) -> None:
    x = fresh()
    optim = make([x], lr=1.0)
    optim.step()  # what is remembered of the first step must not hide a hook that comes later

    def fill(*_: Any) -> None:
        x.grad.fill_(10.0)  # type: ignore[union-attr]

    optim.inner_opt.register_step_pre_hook(fill)
    x.data.zero_()
    x.grad.fill_(1.0)  # type: ignore[union-attr]
    optim.step()
    assert x.tolist() == [[-10.0, -10.0]]


def test_a_step_that_was_replaced_on_the_inner_instance_or_class_is_called() -> None:
    class Backwards(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = -group["lr"]
            return super().step(closure)

    x = fresh()
    L2NormedGradientOptim([x], Backwards, lr=5.0).step()
    torch.testing.assert_close(x.detach(), torch.tensor([[3.0, 4.0]]))
    x = fresh()
    optim = L2NormedGradientOptim([x], lr=5.0)
    calls: list[Any] = []
    optim.inner_opt.step = lambda closure=None: calls.append(closure)  # type: ignore[method-assign]
    optim.step()
    assert calls == [None]
    assert x.tolist() == [[0.0, 0.0]]


def test_global_step_hooks_fire_for_the_outer_and_for_the_inner_optimizer() -> None:
    x, seen = fresh(), []
    optim = L2NormedGradientOptim([x], lr=1.0)
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt))),
    ]
    try:
        optim.step()
    finally:
        for handle in handles:
            handle.remove()
    inner = optim.inner_opt
    assert seen == [("pre", optim), ("pre", inner), ("post", inner), ("post", optim)]


def test_a_step_pre_hook_may_replace_the_closure() -> None:
    x = fresh()
    optim = L2NormedGradientOptim([x], lr=1.0)
    optim.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: "other"), {}))
    assert optim.step(lambda: "mine") == "other"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("inner", [SGD, Adam])
def test_state_dict_hooks_fire_once_each_and_may_replace_the_state_dict(make: Any, inner: Any) -> None:
    optim = make([fresh()], InnerOpt=inner)
    seen: list[str] = []
    optim.register_state_dict_pre_hook(lambda opt: seen.append("outer pre"))
    optim.inner_opt.register_state_dict_pre_hook(lambda opt: seen.append("inner pre"))
    optim.inner_opt.register_state_dict_post_hook(lambda opt, sd: seen.append("inner post"))
    optim.register_state_dict_post_hook(lambda opt, sd: {**sd, "extra": 1})
    optim.register_state_dict_post_hook(lambda opt, sd: seen.append(f"outer post {sd['extra']}"))
    state_dict = optim.state_dict()
    assert seen == ["outer pre", "inner pre", "inner post", "outer post 1"]
    assert state_dict["extra"] == 1


@pytest.mark.parametrize("make", MAKERS)
def test_load_state_dict_hooks_fire_once_each_and_may_replace_the_state_dict(make: Any) -> None:
    optim = make([fresh()], lr=1.0)
    saved = copy.deepcopy(optim.state_dict())
    before = copy.deepcopy(saved)
    seen: list[str] = []

    def pre(opt: Any, sd: dict[str, Any]) -> dict[str, Any]:
        seen.append("outer pre")
        sd["note"] = "the caller's dict must not get this"
        changed = copy.deepcopy(sd)
        changed["param_groups"][0]["lr"] = 7.0
        return changed

    optim.register_load_state_dict_pre_hook(pre)
    optim.register_load_state_dict_post_hook(lambda opt: seen.append(f"outer post {opt.param_groups[0]['lr']}"))
    optim.inner_opt.register_load_state_dict_pre_hook(lambda opt, sd: seen.append("inner pre"))
    optim.inner_opt.register_load_state_dict_post_hook(lambda opt: seen.append("inner post"))
    optim.load_state_dict(saved)
    assert seen == ["outer pre", "inner pre", "inner post", "outer post 7.0"]
    assert saved == before


def test_a_hook_can_be_removed_and_prepended() -> None:
    optim = ParamTransformingOptimizer([fresh()], lr=1.0)
    seen: list[str] = []
    handle = optim.register_step_pre_hook(lambda *_: seen.append("removed"))
    handle.remove()
    optim.register_state_dict_post_hook(lambda *_: seen.append("second"))
    optim.register_state_dict_post_hook(lambda *_: seen.append("first"), prepend=True)
    optim.step()
    optim.state_dict()
    assert seen == ["first", "second"]
