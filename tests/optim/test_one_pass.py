"""The step in one pass, shared out among threads: the same bits as the step in three parts, whoever takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from rai_toolbox import optim
from rai_toolbox.kernels import _threads
from rai_toolbox.optim import _one_pass

# A stack of small tensors, several blocks of data, one datum that is larger than a block, a few large data.
SHAPES = [*[(33,)] * 9, (13, 3, 171, 203), (2**20 + 777,), (7, 150_001), (3, 5)]

BUILDERS: dict[str, Callable[..., optim.ParamTransformingOptimizer]] = {
    "L1Normed": optim.L1NormedGradientOptim,
    "L2Normed": functools.partial(optim.L2NormedGradientOptim, grad_scale=0.3, grad_bias=0.1),
    "L2Projected": functools.partial(optim.L2ProjectedOptim, epsilon=0.7),
    "LinfProjected": functools.partial(optim.LinfProjectedOptim, epsilon=0.7),
    "L2Ball": functools.partial(optim.L2BallOptim, epsilon=0.7),
}


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def after_two_steps(build: Any, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    built = build(params, lr=0.1, **options)
    for _ in range(2):
        built.step()
    return [t.detach() for p in params for t in (p, p.grad) if t is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("param_ndim", [-1, None], ids=["-1", "None"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_neither_the_threads_nor_the_passes_show_in_the_result(
    build: Any, param_ndim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    done_by = _threads._Work.done_by
    monkeypatch.setattr(_threads._Work, "done_by", lambda self, n: shared.append(n) or done_by(self, n))
    options = {"param_ndim": param_ndim}
    torch.set_num_threads(1)
    one = after_two_steps(build, SHAPES, torch.float32, **options)
    assert not shared
    for count in (2, 4):
        torch.set_num_threads(count)
        assert_same(after_two_steps(build, SHAPES, torch.float32, **options), one)
        assert 2 <= max(shared) <= count
    separate = functools.partial(SGD, foreach=False)
    assert_same(after_two_steps(build, SHAPES, torch.float32, InnerOpt=separate, **options), one)


ROW_BUILDERS: dict[str, Callable[..., optim.ParamTransformingOptimizer]] = {
    "TopQ": functools.partial(optim.TopQGradientOptimizer, q=0.9),
    "L1qNormed": functools.partial(optim.L1qNormedGradientOptim, q=0.9),
    "L1Ball": functools.partial(optim.L1BallOptim, epsilon=0.7),
    "Simplex": optim.SimplexOptim,
}


@pytest.mark.parametrize("build", ROW_BUILDERS.values(), ids=ROW_BUILDERS)
def test_neither_shows_where_rows_are_searched(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []
    done_by = _threads._Work.done_by
    monkeypatch.setattr(_threads._Work, "done_by", lambda self, n: shared.append(n) or done_by(self, n))
    shapes = [(1400, 3072), (40, 2**16)]
    torch.set_num_threads(1)
    one = after_two_steps(build, shapes, torch.float32)
    for count in (2, 4):
        torch.set_num_threads(count)
        assert_same(after_two_steps(build, shapes, torch.float32), one)
        separate = functools.partial(SGD, foreach=False)
        assert_same(after_two_steps(build, shapes, torch.float32, InnerOpt=separate), one)
    assert len(shared) >= 8


@pytest.mark.parametrize("param_ndim", [-1, None], ids=["-1", "None"])
def test_in_float64_one_pass_and_three_parts_agree_to_the_last_bit(param_ndim: int | None) -> None:
    torch.set_num_threads(2)
    shapes = [(301, 4099), (2, 2**20 + 77), (40,)]
    build = functools.partial(optim.L2ProjectedOptim, epsilon=0.7, param_ndim=param_ndim)
    one_pass = after_two_steps(build, shapes, torch.float64)
    assert_same(one_pass, after_two_steps(build, shapes, torch.float64, InnerOpt=functools.partial(SGD, foreach=True)))


def half(params: Sequence[Tensor], **options: Any) -> optim.ClampedGradientOptimizer:
    return optim.ClampedGradientOptimizer(params, clamp_max=100.0, grad_scale=0.5, lr=0.1, **options)


def test_parameters_that_share_a_gradient_take_three_parts() -> None:
    shared = torch.ones(2, 2**20)
    params = [torch.ones(2, 2**20, requires_grad=True) for _ in range(3)]
    for p in params:
        p.grad = shared
    half(params).step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 0.1 * 0.5**3))


def test_parameters_that_share_memory_take_three_parts() -> None:
    found = []
    for options in ({}, {"InnerOpt": functools.partial(SGD, foreach=False)}):
        memory = torch.ones(3 * 2**20)
        params = [memory[start : start + 2**21].view(2, 2**20).requires_grad_() for start in (0, 2**20)]
        for p in params:
            p.grad = torch.ones_like(p)
        optim.LinfProjectedOptim(params, lr=1.0, epsilon=0.25, **options).step()
        found.append(memory)
    assert torch.equal(*found)


def test_gradients_that_lie_side_by_side_in_one_memory_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.ones(2**22)  # as the buckets of DistributedDataParallel
    params = [torch.ones(2, 2**20, requires_grad=True) for _ in range(2)]
    for p, g in zip(params, memory.split(2**21), strict=True):
        p.grad = g.view(p.shape)
    taken: list[bool] = []
    monkeypatch.setattr(_one_pass.Blocks, "step", lambda *_: taken.append(True))
    half(params).step()
    assert taken
    monkeypatch.undo()
    half(params).step()
    assert memory.unique().tolist() == [0.5]
