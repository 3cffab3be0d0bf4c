"""A slow path that comes back shows in the number of operator calls, which no other load on the machine changes."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox import optim as ro

BY_NAME = {
    "L1Normed": ro.L1NormedGradientOptim,
    "L2Normed": ro.L2NormedGradientOptim,
    "L2NormedWhole": functools.partial(ro.L2NormedGradientOptim, param_ndim=None),
    "Signed": ro.SignedGradientOptim,
    "L2Projected": functools.partial(ro.L2ProjectedOptim, epsilon=1.0),
    "LinfProjected": functools.partial(ro.LinfProjectedOptim, epsilon=1.0),
    "ClampedGradient": functools.partial(ro.ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=1.0),
}


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(build, shapes: list[tuple[int, ...]], **inner) -> Counter[str]:
    params = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    optim = build(params, lr=0.1, **inner)
    optim.step()  # lays out its plans
    with Count() as count:
        optim.step()
    return count.calls


@pytest.mark.parametrize("build", BY_NAME.values(), ids=BY_NAME)
def test_many_small_tensors_cost_no_more_calls_than_few(build):
    few = calls_of_a_step(build, [(32, 32), (32,)] * 64).total()
    many = calls_of_a_step(build, [(32, 32), (32,)] * 256).total()
    assert few <= many <= few + 8 <= 70  # blocks of bounded size, not tensors, are what is counted


@pytest.mark.parametrize("build", BY_NAME.values(), ids=BY_NAME)
def test_the_three_part_step_costs_no_more_calls_for_more_tensors_either(build):
    inner = {"InnerOpt": functools.partial(torch.optim.SGD, foreach=True)}
    few = calls_of_a_step(build, [(32, 32), (32,)] * 64, **inner).total()
    many = calls_of_a_step(build, [(32, 32), (32,)] * 256, **inner).total()
    assert few <= many <= few + 8 <= 70  # blocks of bounded size, not tensors, are what is counted


@pytest.mark.parametrize(
    "build", [functools.partial(ro.L1BallOptim, epsilon=1.0), ro.SimplexOptim], ids=["L1", "simplex"]
)
def test_small_tensors_are_projected_together(build):
    few, many = (calls_of_a_step(build, [(32, 32), (32,)] * n) for n in (16, 128))
    for views in ("aten.view.default", "aten.detach.default"):
        del few[views], many[views]
    assert many.total() < 2 * few.total()  # a search may take some more steps


@pytest.mark.parametrize("name", ["TopQGradientOptimizer", "L1BallOptim"])
def test_data_of_one_length_are_searched_together_whatever_the_order_of_the_parameters(name: str):
    build = functools.partial(getattr(ro, name), **({"q": 0.9} if name.startswith("TopQ") else {"epsilon": 1.0}))
    shapes = [(128, 576), (128, 512)] * 12
    mixed, sorted_ = calls_of_a_step(build, shapes), calls_of_a_step(build, sorted(shapes))
    assert mixed["aten.abs.out"] <= sorted_["aten.abs.out"] <= 3


def test_a_large_tensor_is_read_and_written_once_per_block():
    calls = calls_of_a_step(ro.L2NormedGradientOptim, [(64, 3, 224, 224)])
    blocks = -(-64 // (2**20 // (3 * 224 * 224)))
    norms, scalings = calls["aten.linalg_vector_norm.out"], calls["aten.mul_.Tensor"]
    updates = calls["aten.add_.Tensor"]
    assert (norms, scalings, updates) == (2 * blocks, blocks, blocks)  # pieces, then their norm


def test_a_norm_of_order_1_takes_few_calls_and_no_memory_for_each_piece():
    build = functools.partial(ro.L1NormedGradientOptim, param_ndim=None)
    calls = calls_of_a_step(build, [(4, 2**20)])  # eight pieces
    assert not calls["aten.new_empty.default"]
    assert calls.total() <= 130


def test_a_step_with_every_parameter_inside_its_ball_writes_no_parameter_after_the_update():
    params = [torch.zeros(8, 5000, requires_grad=True)]
    params[0].grad = torch.ones(8, 5000)
    optim = ro.L2BallOptim(params, lr=1e-3, epsilon=10.0)
    optim.step()
    with Count() as count:
        optim.step()
    assert count.calls["aten._foreach_mul_.List"] == 0
    assert count.calls["aten.mul_.Tensor"] == 0
