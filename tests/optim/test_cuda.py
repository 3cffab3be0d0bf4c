"""What holds on a CUDA device; skipped where there is none."""

from __future__ import annotations

import functools

import pytest
import torch

from rai_toolbox import optim as ro

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

BY_NAME = {
    "L1Normed": ro.L1NormedGradientOptim,
    "L2Normed": ro.L2NormedGradientOptim,
    "L2NormedWhole": functools.partial(ro.L2NormedGradientOptim, param_ndim=None),
    "LpNormed": functools.partial(ro.LpNormedGradientOptim, p=3),
    "Signed": ro.SignedGradientOptim,
    "L1Projected": functools.partial(ro.L1ProjectedOptim, epsilon=1.0),
    "L2Projected": functools.partial(ro.L2ProjectedOptim, epsilon=1.0),
    "LinfProjected": functools.partial(ro.LinfProjectedOptim, epsilon=1.0),
    "TopQ": functools.partial(ro.TopQGradientOptimizer, q=0.9),
    "L1qNormed": functools.partial(ro.L1qNormedGradientOptim, q=0.9),
    "ClampedGradient": functools.partial(ro.ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=1.0),
    "ClampedParameter": functools.partial(ro.ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0),
    "Simplex": ro.SimplexOptim,
}


def parameters(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in ((16, 3, 8, 8), (40, 1), (7,)):
        p = torch.randn(shape, generator=generator).to(device).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).to(device)
        params.append(p)
    return params


@pytest.mark.parametrize("build", BY_NAME.values(), ids=BY_NAME)
def test_a_step_equals_that_of_the_cpu(build):
    here, there = parameters("cpu"), parameters("cuda")
    build(here, lr=0.1).step()
    build(there, lr=0.1).step()
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", BY_NAME.values(), ids=BY_NAME)
def test_a_step_does_not_wait_for_the_device(build):
    params = parameters("cuda")
    optim = build(params, lr=0.1)
    optim.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optim.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("build", BY_NAME.values(), ids=BY_NAME)
def test_a_step_can_be_captured_in_a_graph(build):
    params, twins = parameters("cuda"), parameters("cuda")
    optim, plain = build(params, lr=0.1), build(twins, lr=0.1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            optim.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optim.step()
    graph.replay()
    for _ in range(4):  # three to warm up, one replayed: a capture alone runs nothing
        plain.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["L2Normed", "L2NormedWhole", "L2Projected", "LinfProjected", "Signed"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_step_is_the_ordinary_step_and_does_not_wait(name):
    params, twins = parameters("cuda"), parameters("cuda")
    optim, plain = BY_NAME[name](params, lr=0.1), BY_NAME[name](twins, lr=0.1)
    optim.compile()
    for _ in range(3):
        optim.step()
        plain.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optim.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    plain.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)
