"""`optim.compile()`: the compiled step is the ordinary step, and what cannot be compiled takes the ordinary step."""

from __future__ import annotations

import copy
import gc
import importlib
import shutil
import types
import unittest.mock
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L1NormedGradientOptim,
    L2BallOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    LpNormedGradientOptim,
    OrthogonalizedGradientOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    SphereOptim,
    TopQGradientOptimizer,
)
from rai_toolbox.optim._torch_private import foreach_copy_

pytestmark = [
    # raised by torch's compiler when it is imported
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    # raised by Inductor of torch 2.6
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
]

SHAPES = [(4, 3, 2, 2), (5, 7), (3, 4)]
BUILD: dict[str, Callable[..., Any]] = {
    "L1Normed": L1NormedGradientOptim,
    "L2Normed scaled": partial(L2NormedGradientOptim, grad_scale=3.0, grad_bias=0.25),
    "L2Normed whole": partial(L2NormedGradientOptim, param_ndim=None),
    "L2Normed entries": partial(L2NormedGradientOptim, param_ndim=0),
    "LpNormed": partial(LpNormedGradientOptim, p=3.0),
    "L2Projected": partial(L2ProjectedOptim, epsilon=0.5),
    "L2Ball": partial(L2BallOptim, epsilon=0.5),
    "LinfProjected": partial(LinfProjectedOptim, epsilon=0.5),
    "Signed": SignedGradientOptim,
    "ClampedGradient": partial(ClampedGradientOptimizer, clamp_min=-0.5, clamp_max=0.1),
    "chain": lambda params, **kw: ChainedParamTransformingOptimizer(
        L2NormedGradientOptim,
        partial(ClampedGradientOptimizer, clamp_min=-0.2),
        partial(L1NormedGradientOptim, param_ndim=1),
        partial(ClampedParameterOptimizer, clamp_max=0.9),
        params=params,
        **kw,
    ),
}


class Counting:
    """A backend that runs graphs as they are, and counts how many it was given and how often they ran."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


def stepped(
    build: Callable[..., Any],
    backend: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
    **keywords: Any,
) -> tuple[Any, list[Tensor], list[Tensor]]:
    """An optimizer after some steps, its parameters and their gradients; compiled if there is a backend."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]
    optim = build(params, lr=0.1, **keywords)
    if backend is not None:
        optim.compile(backend=backend)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optim.step()
    return optim, [p.detach() for p in params], [p.grad for p in params if p.grad is not None]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=8 * eps, atol=2 * eps, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in BUILD), ("L2Projected", torch.bfloat16)], ids=str
)
def test_a_compiled_step_is_the_ordinary_step(name: str, dtype: torch.dtype):
    _, params, grads = stepped(BUILD[name], dtype=dtype)
    backend = Counting()
    _, compiled_params, compiled_grads = stepped(BUILD[name], backend, dtype=dtype)
    assert backend.runs >= 3
    assert_same(compiled_params, params)
    assert_same(compiled_grads, grads)


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_the_update_of_the_inner_optimizer_is_in_the_graph(inner: type):
    keywords: Any = {"momentum": 0.9, "weight_decay": 0.1} if inner is torch.optim.SGD else {}
    _, params, _ = stepped(L2NormedGradientOptim, InnerOpt=inner, **keywords)
    backend = Counting()
    optim, compiled, _ = stepped(L2NormedGradientOptim, backend, InnerOpt=inner, **keywords)
    assert backend.graphs == 2  # norms; factors and update
    assert backend.runs == 6
    for x, y in zip(compiled, params, strict=True):
        torch.testing.assert_close(x, y)
    optim.inner_opt.register_step_pre_hook(lambda *_: None)  # somebody looks on
    optim.step()
    assert backend.runs == 6


def test_a_tensor_lr_may_change_without_compiling_anew():
    backend = Counting()
    optim, params, _ = stepped(partial(L2NormedGradientOptim, InnerOpt=torch.optim.Adam), backend)
    optim, params, _ = stepped(
        lambda params, lr, **kw: L2NormedGradientOptim(params, torch.optim.Adam, lr=torch.tensor(lr), **kw), backend
    )
    graphs, before = backend.graphs, [p.clone() for p in params]
    for lr in (0.2, 0.0, 0.3):
        optim.param_groups[0]["lr"].fill_(lr)
        optim.step()
        assert any(not torch.equal(a, b) for a, b in zip(params, before, strict=True)) == (lr > 0)
        before = [p.clone() for p in params]
    assert backend.graphs == graphs


@pytest.mark.parametrize(
    "build",
    [
        partial(TopQGradientOptimizer, q=0.5),
        partial(AveragedGradientOptim, decay=0.5),
        OrthogonalizedGradientOptim,
        SphereOptim,
        lambda params, **kw: ChainedParamTransformingOptimizer(
            AveragedGradientOptim, L2NormedGradientOptim, params=params, **kw
        ),
        partial(L2NormedGradientOptim, InnerOpt=torch.optim.LBFGS),
        type("Own", (L2NormedGradientOptim,), {"_pre_step_transform_": lambda self, param, optim_group: None}),
    ],
    ids=["selection", "average", "matrices", "sphere", "chain", "LBFGS", "own hook"],
)
def test_what_cannot_be_compiled_takes_the_ordinary_step(build: Callable[..., Any]):
    def stepped_once(backend: Any) -> list[Tensor]:
        x = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
        optim: ParamTransformingOptimizer = build([x], lr=0.1)
        if backend is not None:
            optim.compile(backend=backend)

        def closure() -> Tensor:
            optim.zero_grad()
            loss = (x**4).sum()
            loss.backward()
            return loss

        for _ in range(3):
            if isinstance(optim.inner_opt, torch.optim.LBFGS):
                optim.step(closure)
            else:
                closure()
                optim.step()
        return [x.detach()]

    backend = Counting()
    assert torch.equal(stepped_once(backend)[0], stepped_once(None)[0])
    assert backend.graphs == 0


def test_float64_takes_the_ordinary_step():
    backend = Counting()
    _, compiled, _ = stepped(L2NormedGradientOptim, backend, dtype=torch.float64)
    _, params, _ = stepped(L2NormedGradientOptim, dtype=torch.float64)
    assert backend.graphs == 0
    assert all(map(torch.equal, compiled, params))


@pytest.mark.parametrize("name", ["L2Projected", "L2Normed scaled", "chain"])
def test_extreme_entries_give_what_they_give_in_the_ordinary_step(name: str):
    (plain, *ordinary), (optim, *compiled) = stepped(BUILD[name]), stepped(BUILD[name], Counting())
    start = [[x.clone() for x in tensors] for tensors in ordinary]
    for which in (0, 1):  # in a parameter, in a gradient
        for value in (0.0, 1e-45, 3e38, torch.inf, torch.nan):
            for params, grads in (ordinary, compiled):
                foreach_copy_([*params, *grads], [*start[0], *start[1]])
                (params, grads)[which][0][1].fill_(value)
            plain.step()
            optim.step()
            assert_same([x for xs in compiled for x in xs], [x for xs in ordinary for x in xs])


def test_a_copy_works_and_is_not_compiled():
    backend = Counting()
    optim, _, _ = stepped(L2NormedGradientOptim, backend)
    runs = backend.runs
    copied = copy.deepcopy(optim)
    for p in copied.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    copied.step()
    assert backend.runs == runs


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["L2Projected", "LinfProjected"])
def test_inductor_compiles_it(name: str):
    _, params, grads = stepped(BUILD[name])
    _, compiled_params, compiled_grads = stepped(BUILD[name], "inductor")
    assert_same(compiled_params, params)
    assert_same(compiled_grads, grads)


def stepped_once(build: Callable[..., Any], x: Tensor, grad: Tensor, backend: Any) -> Any:
    optim = build([x], lr=1.0)
    optim.compile(backend=backend)
    for _ in range(2):
        x.grad = grad.clone()
        optim.step()
    return optim


@pytest.mark.parametrize(("p", "entry"), [(12.0, 1e-30), (20.0, 1e-20), (1.5, 3e38)])
def test_no_power_of_an_entry_leaves_its_range(p: float, entry: float):
    x = torch.zeros(1, 2, requires_grad=True)
    stepped_once(partial(LpNormedGradientOptim, p=p), x, torch.full((1, 2), entry), Counting())
    torch.testing.assert_close(x.grad, torch.full((1, 2), 2 ** (-1 / p)))


def test_parameters_of_another_shape_or_dtype_are_compiled_anew():
    x = torch.ones(2, 3, requires_grad=True)
    optim = stepped_once(partial(L2ProjectedOptim, epsilon=0.5), x, torch.ones(2, 3), Counting())
    for new in (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bfloat16)):
        x.data = new
        x.grad = torch.ones_like(new)
        optim.step()
        assert torch.allclose(x.float().norm(dim=1), torch.tensor(0.5), rtol=1e-2)


def test_compilations_of_one_optimizer_do_not_count_against_those_of_another():
    graphs = []
    for i in range(1, 11):  # torch's limit for one function is 8
        backend, x = Counting(), torch.zeros(i, 2, requires_grad=True)
        stepped_once(SignedGradientOptim, x, torch.ones(i, 2), backend)
        graphs.append(backend.graphs)
    assert graphs == [1] * 10


def test_a_compiler_that_fails_leaves_a_whole_step_and_says_so():
    counting = Counting()

    def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if counting.graphs == 2:  # the projection
            raise KeyError("buf0")
        return counting(graph, inputs)

    x = torch.ones(2, 3, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"(?s)torch\.compile failed.*buf0"):
        optim = stepped_once(partial(L2ProjectedOptim, epsilon=0.5), x, torch.ones(2, 3), failing)
    y = torch.ones(2, 3, requires_grad=True)
    plain = L2ProjectedOptim([y], lr=1.0, epsilon=0.5)
    for _ in range(2):
        y.grad = torch.ones(2, 3)
        plain.step()
    assert torch.equal(x, y)
    x.grad = torch.ones(2, 3)
    optim.step()


def test_an_expanded_gradient_takes_the_ordinary_step():
    x = torch.ones(2, 3, requires_grad=True)
    optim = stepped_once(L2NormedGradientOptim, x, torch.ones(2, 3), Counting())
    x.grad = torch.ones(()).expand(2, 3)
    optim.step()
    torch.testing.assert_close(x.grad, torch.full((2, 3), 3**-0.5))


def test_parameters_without_a_gradient_and_empty_ones_do_not_stop_it():
    x, resting, empty = (torch.ones(n, 3, requires_grad=True) for n in (2, 2, 0))
    optim = L2ProjectedOptim([x, resting, empty], lr=1.0, epsilon=0.5)
    backend = Counting()
    optim.compile(backend=backend)
    for _ in range(2):
        x.grad, empty.grad = torch.ones(2, 3), torch.ones(0, 3)
        optim.step()
    assert backend.graphs == 4
    assert torch.allclose(resting.norm(dim=1), torch.tensor(0.5))


def test_tensors_that_change_at_every_step_are_given_up_and_it_says_so():
    x = torch.ones(2, 3, requires_grad=True)
    backend = Counting()
    optim = stepped_once(partial(L2ProjectedOptim, epsilon=0.5), x, torch.ones(2, 3), backend)

    def step(rows: int) -> None:
        x.grad = None
        x.data = torch.ones(rows, 3)
        x.grad = torch.ones(rows, 3)
        optim.step()

    for i in range(8):
        step(3 + i)
    with pytest.warns(RuntimeWarning, match="changed 8 times since `compile\\(\\)`"):
        step(11)
    graphs = backend.graphs
    step(12)
    assert backend.graphs == graphs


INNER = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_schedules_of_lr_and_of_our_own_numbers_compile_nothing_again(inner: Any):
    def run(backend: Any) -> tuple[Tensor, int]:
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        optim = ChainedParamTransformingOptimizer(
            partial(L2NormedGradientOptim, grad_scale=2.0, grad_bias=0.5),
            partial(ClampedGradientOptimizer, clamp_min=-0.5, clamp_max=3.0),
            partial(L2BallOptim, epsilon=2.0),
            params=[x],
            InnerOpt=inner,
            lr=0.5,
        )
        if backend is not None:
            optim.compile(backend=backend)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
        graphs = 0
        for i in range(20):
            x.grad = torch.linspace(-2, 1 + i, 12).view(3, 4)
            optim.step()
            scheduler.step()
            assert isinstance(optim.param_groups[0]["lr"], float)
            optim.param_groups[0]["epsilon"] *= 0.95
            optim.param_groups[0]["clamp_max"] *= 0.9
            optim.param_groups[0]["L2NormedGradientOptim.grad_scale"] *= 1.01
            optim.param_groups[0]["L2NormedGradientOptim.grad_bias"] *= 0.9
            graphs = graphs or (backend.graphs if backend is not None and i == 1 else 0)
        assert backend is None or backend.graphs == graphs > 0
        return x.detach(), graphs

    torch.testing.assert_close(run(Counting())[0], run(None)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "most"), [("momentum", 1), ("Adam", 2)])  # Adam: one more, for its step count
def test_signs_the_update_and_a_clamp_become_one_loop(inner: str, most: int):
    metrics, graph, compile_fx = (
        importlib.import_module(f"torch._inductor.{m}") for m in ("metrics", "graph", "compile_fx")
    )
    kernels: list[int] = []

    def generated(lowered: Any) -> Any:
        lowered.codegen()
        return types.SimpleNamespace(call=lambda args: None, __file__="none", value="", runner=None)

    def count(traced: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        metrics.reset()
        with (
            unittest.mock.patch.object(graph.GraphLowering, "compile_to_module", generated),  # no C++ compiler
            importlib.import_module("torch._inductor.config").patch(fx_graph_cache=False),
        ):
            compile_fx.compile_fx(traced, inputs)
        kernels.append(metrics.generated_kernel_count)
        return traced.forward

    x = torch.ones(64, 300, requires_grad=True)
    optim = LinfProjectedOptim([x], INNER[inner], lr=0.1, epsilon=0.5)
    optim.compile(backend=count)
    for _ in range(4):
        x.grad = torch.ones_like(x)
        optim.step()
        optim.param_groups[0]["epsilon"] *= 0.9
    assert len(kernels) == 1
    assert 1 <= kernels[0] <= most


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_what_it_was_made_for_is_freed_with_it(inner: Any):
    def used() -> Any:
        x = torch.ones(2, 3, requires_grad=True)
        optim = L2ProjectedOptim([x], inner, lr=0.1, epsilon=1.0)
        optim.compile(backend="eager")
        for _ in range(3):
            x.grad = torch.ones_like(x)
            optim.step()
        return weakref.ref(optim.inner_opt)

    used()  # what torch keeps when its compiler is first imported
    gc.collect()
    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()


def test_a_compiler_that_refuses_another_compilation_leaves_ordinary_steps_and_says_so():
    x = torch.ones(2, 3, requires_grad=True)
    inner = partial(torch.optim.Adam, foreach=True)  # takes no tensor for a learning rate
    optim = L2NormedGradientOptim([x], inner, lr=1.0)
    optim.compile(backend=Counting())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
    y = torch.ones(2, 3, requires_grad=True)
    plain = L2NormedGradientOptim([y], inner, lr=1.0)
    config: Any = torch._dynamo.config
    limit = {"recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit": 1}  # torch 2.6's name
    warned = []
    for i in range(20):
        x.grad = torch.full((2, 3), 1.0 + i)
        y.grad = x.grad.clone()
        plain.param_groups[0]["lr"] = optim.param_groups[0]["lr"]
        with warnings.catch_warnings(record=True) as caught, config.patch(limit):
            warnings.simplefilter("always")
            optim.step()
        warned += [w for w in caught if "torch.compile failed" in str(w.message)]
        plain.step()
        scheduler.step()
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert len(warned) == 1
