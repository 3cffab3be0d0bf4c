"""State, groups and defaults are the inner optimizer's, through everything; arguments; repr."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from optimizer_cases import ALL_CASES, Case
from torch.optim import SGD, Adam

from rai_toolbox import optim as rai
from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    JointOptimizer,
    L1FrankWolfe,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

IDS = [case.name for case in ALL_CASES]
STATEFUL = ["SGD", "Adam", "AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Adafactor"]


def parameter(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def chain(params: Any, InnerOpt: Any = SGD, **options: Any) -> ChainedParamTransformingOptimizer:
    return ChainedParamTransformingOptimizer(
        functools.partial(TopQGradientOptimizer, q=0.5),
        functools.partial(ClampedGradientOptimizer, clamp_max=0.5),
        functools.partial(ClampedParameterOptimizer, clamp_min=-2.0),
        params=params,
        InnerOpt=InnerOpt,
        **options,
    )


def wrappers_in(optim: Any) -> list[Any]:
    """The optimizer, the links of a chain, and the inner optimizers."""
    found = [optim, *getattr(optim, "_links", ())]
    while isinstance(found[-1], ParamTransformingOptimizer):
        found.append(found[-1].inner_opt)
    return found


def assert_same_objects(optim: Any) -> None:
    inner = optim.inner_opt
    for wrapper in wrappers_in(optim):
        assert wrapper.param_groups is inner.param_groups
        assert wrapper.state is inner.state
        assert wrapper.defaults is inner.defaults
    assert optim.state_dict() == inner.state_dict()


def step(optim: Any, times: int = 1) -> None:
    for i in range(times):
        for group in optim.param_groups:
            for p in group["params"]:
                p.grad = parameter(*p.shape, seed=i).detach()
        optim.step()


@pytest.mark.parametrize(
    "make", [L2NormedGradientOptim, chain, functools.partial(L2NormedGradientOptim, InnerOpt=functools.partial(chain))]
)
def test_groups_state_and_defaults_stay_the_same_objects_through_everything(make: Any) -> None:
    x = parameter(2, 4)
    options = {} if isinstance(make, functools.partial) else {"InnerOpt": functools.partial(SGD, momentum=0.9)}
    if isinstance(make, functools.partial):
        make = functools.partial(
            L2NormedGradientOptim, InnerOpt=lambda params, lr: chain(params, InnerOpt=SGD, lr=lr, momentum=0.9)
        )
    optim = make([x], lr=0.1, **options)
    innermost = optim.inner_opt

    def check() -> None:
        assert optim.inner_opt is innermost
        assert_same_objects(optim)
        before = x.detach().clone()
        step(optim)
        assert not torch.equal(before, x)
        assert_same_objects(optim)

    check()
    optim.add_param_group({"params": [parameter(3, 2)]})
    check()
    saved = copy.deepcopy(optim.state_dict())
    optim.load_state_dict(saved)
    check()
    optim.inner_opt.load_state_dict(saved)
    check()
    optim.load_state_dict(copy.deepcopy(optim.inner_opt).state_dict())
    check()
    optim.state = copy.copy(optim.state)
    check()
    optim.inner_opt.state = copy.copy(optim.state)
    check()
    optim.param_groups = list(optim.param_groups)
    check()
    optim.defaults = dict(optim.defaults)
    check()
    torch.optim.Optimizer.load_state_dict(optim, saved)
    check()


@pytest.mark.parametrize("case", ALL_CASES, ids=IDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_exactly_as_the_original(case: Case, way: str) -> None:
    x = parameter(3, 4)
    optim = case.build([x], InnerOpt=functools.partial(SGD, lr=0.1, momentum=0.9))
    step(optim, 2)
    other = copy.deepcopy(optim) if way == "deepcopy" else pickle.loads(pickle.dumps(optim))
    assert type(other) is type(optim)
    assert_same_objects(other)
    y = other.param_groups[0]["params"][0]
    assert y is not x
    assert torch.equal(x, y)
    step(optim, 3)
    step(other, 3)
    assert torch.equal(x, y)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_chain_goes_on_exactly_as_the_original(way: str) -> None:
    x = parameter(3, 4)
    optim = chain([x], Adam, lr=0.1)
    step(optim, 2)
    other = copy.deepcopy(optim) if way == "deepcopy" else pickle.loads(pickle.dumps(optim))
    assert_same_objects(other)
    step(optim, 3)
    step(other, 3)
    assert torch.equal(x, other.param_groups[0]["params"][0])


def test_a_model_and_its_optimizer_copied_together_stay_together() -> None:
    model = torch.nn.Linear(3, 2)
    optim = L2NormedGradientOptim(model.parameters(), param_ndim=None, lr=1.0)
    both = copy.deepcopy({"model": model, "optim": optim})
    assert both["optim"].param_groups[0]["params"][0] is both["model"].weight


def test_a_copy_leaves_behind_what_others_put_on_the_instance() -> None:
    x = parameter(2, 3)
    optim = L2NormedGradientOptim([x], lr=0.1)
    lock_like = lambda *args, **kwargs: None  # noqa: E731  (cannot be pickled)
    optim.step = lock_like  # type: ignore[method-assign]
    optim.register_step_pre_hook(lock_like)
    other = pickle.loads(pickle.dumps(optim))
    assert "step" not in other.__dict__
    step(other)
    assert torch.equal(copy.deepcopy(optim).param_groups[0]["params"][0], x)


def test_a_generator_survives_copies_and_the_default_one_stays_the_default_one() -> None:
    own = TopQGradientOptimizer([parameter(2, 40)], q=0.5, dq=0.3, generator=torch.Generator().manual_seed(3))
    other = pickle.loads(pickle.dumps(own))
    step(own, 3)
    step(other, 3)
    assert torch.equal(own.param_groups[0]["params"][0], other.param_groups[0]["params"][0])
    default = pickle.loads(pickle.dumps(TopQGradientOptimizer([parameter(2, 40)], q=0.5, dq=0.3)))
    before = torch.get_rng_state()
    step(default)
    assert not torch.equal(before, torch.get_rng_state())


def test_parameters_and_state_may_be_swapped_in_and_back() -> None:
    stateless = pytest.importorskip("torch.optim._stateless", reason="this torch has no stateless optimizers")
    x, y = parameter(2, 3), parameter(2, 3)
    optim, other = L2NormedGradientOptim([x], Adam, lr=0.1), L2NormedGradientOptim([y], Adam, lr=0.1)
    step(optim)
    step(other)
    z, saved, state = x.detach().clone().requires_grad_(), copy.deepcopy(optim.state_dict()), optim.state
    with stateless.swap_in_optimizer_params_and_state(optim, {"z": z}, saved):
        step(optim)
    assert optim.state is state
    assert_same_objects(optim)
    assert torch.equal(x, y)
    step(other)
    assert torch.equal(z, y)
    step(optim)
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", STATEFUL)
def test_nothing_is_in_the_state_before_the_first_step_of_the_inner_optimizer(name: str) -> None:
    inner = getattr(torch.optim, name)
    for build in (functools.partial(L2NormedGradientOptim, InnerOpt=inner), functools.partial(chain, InnerOpt=inner)):
        x = parameter(2, 3)
        optim = build([x])
        assert not optim.state
        step(optim, 2)
        bare = inner([parameter(2, 3)])
        step(bare)
        assert optim.state[x].keys() == bare.state[bare.param_groups[0]["params"][0]].keys()


# Arguments.


@pytest.mark.parametrize(
    "make",
    [
        ParamTransformingOptimizer,
        SignedGradientOptim,
        L2NormedGradientOptim,
        chain,
        functools.partial(L2ProjectedOptim, epsilon=1.0),
        functools.partial(ClampedGradientOptimizer, clamp_max=1.0),
        functools.partial(TopQGradientOptimizer, q=0.5),
    ],
)
def test_no_class_changes_the_callers_defaults(make: Any) -> None:
    defaults = {"grad_scale": 2.0, "lr": 0.5}
    make([parameter(2, 3)], defaults=defaults)
    assert defaults == {"grad_scale": 2.0, "lr": 0.5}


def test_the_callers_defaults_and_groups_are_not_changed_and_do_not_leak() -> None:
    defaults = {"grad_scale": 2.0}
    group: dict[str, Any] = {"params": [parameter(2, 3)], "lr": 0.5}
    before = (dict(defaults), dict(group))
    optim = L2NormedGradientOptim([group], lr=1.0, defaults=defaults)
    optim.add_param_group(added := {"params": parameter(2, 2)})
    assert (defaults, group) == before
    assert list(added) == ["params"]
    other = SignedGradientOptim([parameter(2, 3)], defaults=defaults)
    assert "div_by_zero_eps" not in other.param_groups[0]
    assert optim.defaults is not defaults


@pytest.mark.parametrize(
    ("make", "keyword", "entry"),
    [
        (L2NormedGradientOptim, {"grad_scale": 2.0}, {"grad_scale": 3.0}),
        (L2NormedGradientOptim, {"param_ndim": 1}, {"param_ndim": None}),
        (L2NormedGradientOptim, {"div_by_zero_eps": 1.0}, {"div_by_zero_eps": 0.5}),
        (L2ProjectedOptim, {"epsilon": 1.0}, {"epsilon": 2.0}),
        (TopQGradientOptimizer, {"q": 0.5}, {"q": 0.25}),
        (ClampedGradientOptimizer, {"clamp_max": 1.0}, {"clamp_max": 2.0}),
        (L2NormedGradientOptim, {"lr": 1.0}, {"lr": 0.5}),
        (chain, {"grad_scale": 2.0}, {"grad_scale": 3.0}),
    ],
)
def test_an_explicit_default_wins_over_the_keyword_of_the_same_name(
    make: Any, keyword: dict[str, Any], entry: dict[str, Any]
) -> None:
    optim = make([parameter(2, 3)], defaults=entry, **keyword)
    (name, value) = next(iter(entry.items()))
    assert optim.param_groups[0][name] == value
    assert optim.defaults[name] == value


def test_what_a_group_says_wins_over_defaults_and_keywords() -> None:
    groups = [{"params": [parameter(2, 3)], "grad_scale": 5.0, "lr": 7.0}, {"params": [parameter(2, 2)]}]
    optim = L2NormedGradientOptim(groups, lr=1.0, grad_scale=2.0, defaults={"grad_scale": 3.0, "lr": 4.0})
    assert [g["grad_scale"] for g in optim.param_groups] == [5.0, 3.0]
    assert [g["lr"] for g in optim.param_groups] == [7.0, 4.0]


@pytest.mark.parametrize("name", ["grad_scale", "grad_bias"])
@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_a_scale_or_bias_that_is_no_number_is_a_type_error(name: str, value: Any) -> None:
    for how in ({name: value}, {"defaults": {name: value}}):
        with pytest.raises(TypeError, match=name):
            L2NormedGradientOptim([parameter(2, 3)], **how)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        L2NormedGradientOptim([{"params": [parameter(2, 3)], name: value}])


@pytest.mark.parametrize("make", [functools.partial(SGD, lr=0.5), lambda params: SGD(params, lr=0.5), SGD])
def test_inner_opt_may_be_a_class_a_partial_or_any_callable(make: Any) -> None:
    optim = L2NormedGradientOptim([parameter(2, 3)], make)
    assert isinstance(optim.inner_opt, SGD)


def test_inner_opt_may_be_an_optimizer_whose_groups_are_then_used() -> None:
    x = parameter(2, 3)
    sgd = SGD([{"params": [x], "lr": 0.25}])
    optim = L2ProjectedOptim(None, sgd, epsilon=1.0)
    assert optim.inner_opt is sgd
    assert optim.param_groups is sgd.param_groups
    assert optim.param_groups[0]["epsilon"] == 1.0
    assert_same_objects(optim)
    assert L2ProjectedOptim([x], sgd, epsilon=1.0).inner_opt is sgd


def test_params_may_be_tensors_named_tensors_groups_or_a_generator_of_them() -> None:
    model = torch.nn.Linear(3, 2)
    for params in (
        model.parameters(),
        model.named_parameters(),
        list(model.parameters()),
        [{"params": model.weight}, {"params": [model.bias], "lr": 0.5}],
        ({"params": p} for p in model.parameters()),
        [{"params": model.named_parameters()}],
    ):
        optim = L2NormedGradientOptim(params, param_ndim=None, lr=1.0)
        assert [p for g in optim.param_groups for p in g["params"]] == [model.weight, model.bias]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((None,), {}, TypeError, "params"),
        (([parameter(2)], 3), {}, TypeError, "InnerOpt"),
        (([parameter(2)], "SGD"), {}, TypeError, "InnerOpt"),
        (([parameter(2)], dict), {}, TypeError, "Optimizer|dict"),
        (([parameter(2)], lambda p: None), {}, TypeError, "return"),
        ((None, SGD([parameter(2)])), {"lr": 1.0}, TypeError, "lr"),
        (([parameter(2)], SGD([parameter(2)])), {}, ValueError, "params"),
        (([],), {}, ValueError, "empty parameter list"),
        (([parameter(2)],), {"momentun": 0.9}, TypeError, "momentun"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(args: Any, kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ParamTransformingOptimizer(*args, **kwargs)


REQUIRED = [
    (L2ProjectedOptim, {}, "epsilon", 1.0),
    (LinfProjectedOptim, {}, "epsilon", 1.0),
    (rai.L1ProjectedOptim, {}, "epsilon", 1.0),
    (rai.L2BallOptim, {}, "epsilon", 1.0),
    (L1FrankWolfe, {}, "epsilon", 1.0),
    (rai.L2FrankWolfe, {}, "epsilon", 1.0),
    (rai.LinfFrankWolfe, {}, "epsilon", 1.0),
    (L1qFrankWolfe, {"q": 0.5}, "epsilon", 1.0),
    (L1qFrankWolfe, {"epsilon": 0.5}, "q", 0.5),
    (TopQGradientOptimizer, {}, "q", 0.5),
    (L1qNormedGradientOptim, {}, "q", 0.5),
]


@pytest.mark.parametrize(("cls", "given", "name", "value"), REQUIRED)
def test_a_required_option_may_come_from_every_group_or_from_defaults_and_else_is_a_type_error(
    cls: Any, given: dict[str, Any], name: str, value: float
) -> None:
    with pytest.raises(TypeError, match=name):
        cls([parameter(2, 3)], **given)
    groups = [{"params": [parameter(2, 3)], name: value}, {"params": [parameter(2, 3)]}]
    with pytest.raises(TypeError, match=name):
        cls(groups, **given)
    groups[1][name] = value / 2
    optim = cls(groups, **given)
    assert [g[name] for g in optim.param_groups] == [value, value / 2]
    with pytest.raises(TypeError, match=name):
        optim.add_param_group({"params": [parameter(2, 3)]})
    if "FrankWolfe" not in cls.__name__:
        assert cls([parameter(2, 3)], defaults={name: value}, **given).param_groups[0][name] == value


def test_no_attribute_has_a_name_that_grad_scaler_or_the_inner_optimizer_would_take_for_its_own() -> None:
    optim = L2ProjectedOptim([parameter(2, 3)], functools.partial(Adam, fused=True), epsilon=1.0)
    for name in ("grad_scale", "found_inf", "_step_supports_amp_scaling", "no_such_attribute"):
        assert not hasattr(optim, name)
    for case in ALL_CASES:
        ours = set(case.build([parameter(2, 3)]).param_groups[0]) - set(SGD([parameter(2)]).param_groups[0])
        taken = {"eps", "momentum", "weight_decay", "maximize", "step", "foreach", "fused", "capturable"}
        assert not ours & taken


# repr.


def test_repr_names_the_class_the_inner_class_and_prints_the_groups_as_torch_does() -> None:
    optim = L2NormedGradientOptim([parameter(2, 3)], lr=0.5)
    text = repr(optim)
    assert text.startswith("L2NormedGradientOptim [SGD](\nParameter Group 0\n")
    assert text.partition("(")[2] == repr(optim.inner_opt).partition("(")[2]
    assert "    param_ndim: -1\n" in text


def test_repr_of_a_chain_prints_the_last_link_first() -> None:
    optim = ChainedParamTransformingOptimizer(
        functools.partial(TopQGradientOptimizer, q=0.5),
        functools.partial(ClampedGradientOptimizer, clamp_max=1.0),
        params=[parameter(2, 3)],
    )
    assert repr(optim).startswith("ClampedGradientOptimizer ○ TopQGradientOptimizer [SGD](\n")


def test_it_is_an_optimizer_and_zero_grad_works() -> None:
    x = parameter(2, 3)
    optim = L2NormedGradientOptim([x])
    assert isinstance(optim, torch.optim.Optimizer)
    step(optim)
    optim.zero_grad(set_to_none=False)
    assert torch.equal(x.grad, torch.zeros(2, 3))
    optim.zero_grad()
    assert x.grad is None


@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize("how", ["params", "groups"])
def test_a_parameter_that_is_taken_out_of_the_optimizer_is_let_go(inner: Any, how: str) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    optim = L2ProjectedOptim([x], inner, lr=0.1, epsilon=1.0)
    seen = []
    for _ in range(5):
        y = torch.zeros(2, 3, requires_grad=True)
        y.grad = torch.ones(2, 3)
        seen.append(weakref.ref(y))
        optim.state.clear()
        if how == "params":
            optim.param_groups[0]["params"] = [y]
        else:
            optim.param_groups.clear()
            optim.add_param_group({"params": [y]})
        optim.step()
    del y
    gc.collect()
    assert sum(ref() is not None for ref in seen) == 1


def test_wrappers_that_are_gone_leave_no_hook_on_the_inner_optimizer() -> None:
    inner = SGD([torch.zeros(2, 3, requires_grad=True)], lr=0.1)
    for _ in range(3):
        optim = L2NormedGradientOptim(None, inner)
    del optim
    gc.collect()
    assert not inner._optimizer_load_state_dict_pre_hooks
    assert not inner._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(L2NormedGradientOptim, lr=0.1),
        functools.partial(L2NormedGradientOptim, lr=0.1, momentum=0.9),
        functools.partial(L2ProjectedOptim, InnerOpt=Adam, epsilon=1.0),
        lambda params: ChainedParamTransformingOptimizer(AveragedGradientOptim, SignedGradientOptim, params=params),
        lambda params: JointOptimizer(AveragedGradientOptim(params, momentum=0.9)),
        type("Own", (ParamTransformingOptimizer,), {"_pre_step_transform_": lambda self, param, optim_group: None}),
    ],
    ids=["SGD", "momentum", "Adam", "chain", "joint", "hook"],
)
def test_an_optimizer_that_nobody_holds_is_freed_at_once(build: Any) -> None:
    build([parameter(2, 3)])  # the first one has torch import its compiler
    x = parameter(2, 3)
    optim = build([x])
    step(optim, 2)
    optim.step(lambda: x.sum())
    optim.load_state_dict(optim.state_dict())
    gone = weakref.ref(optim), weakref.ref(optim.inner_opt)
    gc.collect()
    gc.disable()
    try:
        del optim
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
