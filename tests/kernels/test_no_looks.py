"""No step on a GPU looks at a value: that would wait for the device. On fake tensors, a look raises.

It wants a CUDA build of torch, and no GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from optimizer_cases import ALL_CASES, MATRIX_CASES, Case
from tests.kernels.fake_gpu import needs_fake_tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import StepLR

from rai_toolbox import optim as ro

pytestmark = needs_fake_tensors
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
INNER = {"SGD": torch.optim.SGD, "Momentum": functools.partial(torch.optim.SGD, momentum=0.9), "Adam": torch.optim.Adam}


def parameters(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    params = [torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def takes_steps(optim: Any) -> None:
    """Three of them, with a schedule of the learning rate."""
    schedule = StepLR(optim, step_size=1, gamma=0.5)
    for _ in range(3):
        optim.step()
        schedule.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_no_class_looks_in_groups_around_any_optimizer(case: Case, dtype: torch.dtype) -> None:
    short, long = ((8, 5), (4, 3, 6)) if case in MATRIX_CASES else ((8, 5), (3, 9001))
    for inner in INNER.values():
        with FakeTensorMode(allow_non_fake_inputs=True):
            first, second = parameters(dtype, short, long), parameters(dtype, short)
            takes_steps(case.build([{"params": first}, {"params": second, "lr": 0.25}], lr=0.5, InnerOpt=inner))


BALLS = (
    ro.L1ProjectedOptim,
    ro.L2ProjectedOptim,
    ro.LinfProjectedOptim,
    ro.L1BallOptim,
    ro.L2BallOptim,
    ro.LinfBallOptim,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", BALLS)
def test_a_radius_for_each_datum_and_a_box_of_tensors_are_not_looked_at(cls: type, dtype: torch.dtype) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        box: dict[str, Any] = {}
        if cls in BALLS[3:]:
            ones = torch.ones(9001, device="cuda", dtype=dtype)
            box = {"lower": -ones, "upper": ones}
        radii = torch.ones(3, device="cuda")
        groups = [{"params": parameters(dtype, (3, 9001))} for _ in range(2)]
        optim = cls(groups, lr=0.5, epsilon=0.5, param_ndim=-1, **box)
        optim.param_groups[0]["epsilon"] = radii  # given to the class, it is looked at there, once
        takes_steps(optim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_a_chain_does_not_look(inner: str, dtype: torch.dtype) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        takes_steps(
            ro.ChainedParamTransformingOptimizer(
                functools.partial(ro.TopQGradientOptimizer, q=0.5),
                ro.L2NormedGradientOptim,
                functools.partial(ro.ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0),
                params=parameters(dtype, (8, 5), (3, 9001)),
                InnerOpt=INNER[inner],
                lr=0.5,
            )
        )


def test_a_look_would_raise() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        (p,) = parameters(torch.float32, (3,))
        with pytest.raises(Exception, match=r"item|_local_scalar_dense"):
            p.sum().item()


@pytest.mark.parametrize("cls", [ro.L1ProjectedOptim, ro.L2ProjectedOptim, ro.LinfProjectedOptim, ro.L2FrankWolfe])
def test_a_radius_for_each_datum_may_be_a_fake_tensor(cls: Any) -> None:
    with FakeTensorMode():
        (p,) = parameters(torch.float32, (4, 5))
        takes_steps(cls([p], lr=0.1, epsilon=torch.full((4,), 0.5, device="cuda"), param_ndim=1))
