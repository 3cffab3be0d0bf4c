"""No step allocates a tensor as large as the largest parameter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from optimizer_cases import BY_NAME, CASES, Case
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rai_toolbox import optim

SHAPE = (96, 2**16)  # 6 Mi entries: three of the blocks that a step works on


class LargestAllocation(TorchDispatchMode):
    """The largest number of bytes of a storage that an operation returned and that no argument had."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def storages(tree: Any) -> dict[int, int]:
            tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout is torch.strided]
            return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

        before = storages((args, kwargs))
        out = func(*args, **kwargs)
        for pointer, nbytes in storages(out).items():
            if pointer not in before and nbytes > self.nbytes:
                self.nbytes, self.by = nbytes, str(func)
        return out


def largest_allocation(
    built: torch.optim.Optimizer, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> tuple[int, str]:
    """In the second step, when all state is there."""
    x.grad = first
    built.step()
    x.grad = second
    with LargestAllocation() as seen:
        built.step()
    return seen.nbytes, seen.by


def check(
    case: Case, dtype: torch.dtype, param_ndim: int | None, limit: int, scale: float = 1.0, **options: Any
) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    g = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).mul_(scale).to(dtype)
    built = case.build([x], InnerOpt=functools.partial(SGD, lr=0.1), param_ndim=param_ndim, **options)
    nbytes, by = largest_allocation(built, x, g, g.flip(0))
    assert nbytes < limit, by


CLASSES = [c for c in CASES if not c.name.endswith(" 0")]


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSES, ids=lambda c: c.name)
def test_a_step_of_a_batch_of_data_allocates_less_than_the_parameter(case: Case) -> None:
    check(case, torch.float32, -1, 4 * SHAPE[0] * SHAPE[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSES, ids=lambda c: c.name)
def test_a_step_of_one_large_datum_allocates_less_than_the_parameter(case: Case) -> None:
    check(case, torch.float32, None, 4 * SHAPE[0] * SHAPE[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L1Ball 0.75", "L2Ball 0.75", "LinfBall 0.75"])
def test_a_step_of_one_large_datum_in_a_ball_and_a_box_allocates_less_than_the_parameter(name: str) -> None:
    check(BY_NAME[name], torch.float32, None, 4 * SHAPE[0] * SHAPE[1], lower=-torch.ones(SHAPE), upper=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_a_norm_out_of_the_ordinary_allocates_less_than_the_parameter(p: float, scale: float) -> None:
    case = Case("", optim.LpNormedGradientOptim, {"p": p})
    check(case, torch.float32, None, 4 * SHAPE[0] * SHAPE[1], scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L1Normed", "L2Normed", "TopQ", "L1Projected 0.75", "L2Projected 0.75"])
def test_a_step_of_a_batch_in_bfloat16_allocates_less_than_the_parameter_in_float32(name: str) -> None:
    check(BY_NAME[name], torch.bfloat16, -1, 4 * SHAPE[0] * SHAPE[1])
