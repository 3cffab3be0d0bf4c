"""Every optimizer of torch as the inner one: as if the gradients had been transformed by hand, bit for bit."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput, optim_db

from rai_toolbox.functional import normalize_
from rai_toolbox.optim import (
    ClampedGradientOptimizer,
    L2NormedGradientOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

STEPS = 10

WRAPPERS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any]]] = {
    "plain": (functools.partial(ParamTransformingOptimizer, param_ndim=None), lambda g: g),
    "scaled": (functools.partial(ParamTransformingOptimizer, param_ndim=None, grad_scale=1.7), lambda g: g.mul_(1.7)),
    "scaled and shifted": (
        functools.partial(ParamTransformingOptimizer, param_ndim=None, grad_scale=-0.3, grad_bias=0.7),
        lambda g: g.mul_(-0.3).add_(0.7),
    ),
    "L2Normed": (
        functools.partial(L2NormedGradientOptim, param_ndim=None),
        lambda g: normalize_(g, 2, param_ndim=None),
    ),
    "Signed": (SignedGradientOptim, lambda g: g.sign_()),
    "Clamped": (
        functools.partial(ClampedGradientOptimizer, clamp_min=-0.5, clamp_max=0.25),
        lambda g: g.clamp_(-0.5, 0.25),
    ),
}


def shapes_for(name: str) -> list[tuple[int, ...]]:
    return [(3, 4), (5, 2)] if name == "Muon" else [(3, 4), (5,)]


def run(
    info: OptimizerInfo, options: dict[str, Any], build: Callable[..., Any], by_hand: Callable[[Tensor], Any] | None
) -> list[Tensor]:
    """The parameters and gradients of every step."""
    gen = torch.Generator().manual_seed(0)
    name = info.optim_cls.__name__
    params = [torch.randn(shape, generator=gen).requires_grad_() for shape in shapes_for(name)]
    targets = [torch.randn(p.shape, generator=gen) for p in params]
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    optim = build(params, **options)
    trace = []

    def closure() -> Tensor:
        optim.zero_grad()
        loss = sum(((p - t) ** 2 + 1).sqrt().sum() for p, t in zip(params, targets, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        for p in params:
            assert p.grad is not None
            if info.only_supports_sparse_grads:
                p.grad = p.grad.to_sparse(1)
            if by_hand is not None:
                by_hand(p.grad._values() if p.grad.is_sparse else p.grad)
        return loss

    for _ in range(STEPS):
        if info.step_requires_closure:
            loss = optim.step(closure)
        else:
            loss = closure()
            optim.step()
        trace += [loss.detach().clone(), *(p.detach().clone() for p in params)]
        trace += [p.grad.to_dense().clone() for p in params if p.grad is not None]
    return trace


def _inputs() -> list[Any]:
    cases = []
    for info in optim_db:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs: list[OptimizerInput] = info.optim_inputs_func("cpu")
        for given in inputs:
            for impl in ("default", *info.supported_impls):
                if impl == "default":
                    kwargs = dict(given.kwargs)
                elif ("Tensor lr" in given.desc and impl == "foreach") or impl == "differentiable":
                    continue  # torch refuses the one, and the other needs parameters that are not leaves
                else:
                    kwargs = {**given.kwargs, impl: True}
                if info.optim_cls is LBFGS:
                    kwargs["max_iter"] = 5
                cases.append(pytest.param(info, kwargs, id=f"{info.optim_cls.__name__}-{given.desc}-{impl}"))
    return cases


@pytest.mark.parametrize(("info", "options"), _inputs())
def test_ten_steps_are_those_of_the_bare_optimizer_on_gradients_transformed_by_hand(
    info: OptimizerInfo, options: dict[str, Any]
) -> None:
    for name, (wrapper, by_hand) in WRAPPERS.items():
        if info.only_supports_sparse_grads and name == "scaled and shifted":
            continue  # a bias makes a sparse gradient dense
        bare = run(info, options, info.optim_cls, by_hand)
        wrapped = run(info, options, functools.partial(wrapper, InnerOpt=info.optim_cls), None)
        for step, (ours, theirs) in enumerate(zip(wrapped, bare, strict=True)):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, at=(name, step): f"{at}: {m}"
            )
            assert torch.isfinite(ours).all() or info.optim_cls.__name__ == "LBFGS"


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_what_the_inner_optimizer_refuses_is_still_refused(info: OptimizerInfo) -> None:
    for given in info.optim_error_inputs_func("cpu", torch.float32):
        error_input, on = given.optimizer_error_input, given.error_on.name
        if on != "CONSTRUCTION_ERROR" or issubclass(given.error_type, Warning):
            continue
        params = error_input.params or [torch.ones(3, 4, requires_grad=True)]
        with pytest.raises(given.error_type, match=given.error_regex):
            ParamTransformingOptimizer(params, info.optim_cls, param_ndim=None, **error_input.kwargs)


def _adagrad_takes_a_later_group() -> bool:
    late = torch.ones(1, requires_grad=True)
    optim = torch.optim.Adagrad([torch.ones(1, requires_grad=True)])
    optim.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    try:
        optim.step()
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("info", [i for i in optim_db if i.supports_param_groups], ids=lambda i: i.optim_cls.__name__)
def test_groups_reach_every_inner_optimizer(info: OptimizerInfo) -> None:
    shape = (3, 4)
    groups = [{"params": [torch.ones(shape, requires_grad=True)], "lr": lr} for lr in (0.1, 0.2)]
    optim = ParamTransformingOptimizer(groups, info.optim_cls, grad_scale=2.0)
    if info.optim_cls is torch.optim.Adagrad and not _adagrad_takes_a_later_group():
        pytest.skip("this torch's own Adagrad fails with a group that was added later")
    optim.add_param_group({"params": [torch.ones(shape, requires_grad=True)], "lr": 0.3})
    for group in optim.param_groups:
        for p in group["params"]:
            grad = torch.full(shape, 0.5)
            p.grad = grad.to_sparse(1) if info.only_supports_sparse_grads else grad
    optim.step()
    values = [g["params"][0].detach() for g in optim.param_groups]
    assert all(not torch.equal(v, torch.ones(shape)) for v in values)
    assert len(optim.state) in (0, 3)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"param_dim": 1}, r"`param_dim` is .* neither of L2NormedGradientOptim nor .* SGD; did you mean `param_ndim`"),
        ({"momentun": 0.9}, "did you mean `momentum`"),
        ({"xyz": 1.0}, r"they have .*param_ndim.*weight_decay"),
        ({"InnerOpt": functools.partial(torch.optim.Adam, eps=1e-7), "beta": (0.9, 0.9)}, "did you mean `betas`"),
        ({"InnerOpt": SignedGradientOptim, "moment": 0.9}, "neither of SignedGradientOptim nor"),
    ],
)
def test_a_keyword_that_nobody_takes_is_named_with_its_likely_spelling(keywords, said):
    with pytest.raises(TypeError, match=said):
        L2NormedGradientOptim([torch.ones(2, requires_grad=True)], **{"lr": 0.1} | keywords)


def test_a_module_in_place_of_its_parameters_is_told_so():
    for given in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).parameters):
        with pytest.raises(TypeError, match=rf"as `model.parameters\(\)` is, got {type(given).__name__}"):
            L2NormedGradientOptim(given, lr=0.1)
