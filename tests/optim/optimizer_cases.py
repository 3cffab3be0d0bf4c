"""Every optimizer class with options and oracles, and tensors of every dtype, magnitude, shape and stride."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import longdouble_oracles as ld
import numpy as np
import torch
from torch import Tensor

from rai_toolbox import optim
from rai_toolbox.functional import datum_ndim
from rai_toolbox.optim._memory import zeros_wide
from rai_toolbox.optim._running import Remembering

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Idle(torch.optim.Optimizer):
    """An inner optimizer that leaves parameters alone, so that only the transforms are seen."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


# A transform that remembers is one function and one class; the suites hold this one, which is not ours to ship, to
# all that they hold the others to.


def root_mean_square(decay: float) -> Remembering:
    """x / √v, where v is a running average of x²."""

    def divide_(xs: Sequence[Tensor], memory: Mapping[str, Sequence[Tensor]]) -> None:
        for x, v in zip(xs, memory["square"], strict=True):
            v.lerp_(x.square(), 1 - decay)
            x.div_(v.sqrt().add_(1e-8))

    return Remembering(divide_, {"square": zeros_wide})


class RootMeanSquareOptim(optim.ParamTransformingOptimizer):
    """Divide each gradient by the root of a running average of its square."""

    def __init__(self, params: Any, InnerOpt: Any = torch.optim.SGD, *, decay: float = 0.9, **options: Any) -> None:
        super().__init__(params, InnerOpt, **{**options, "defaults": {"decay": decay, **options.get("defaults", {})}})

    def _grad_transform(self, optim_group: Any) -> Remembering:
        return root_mean_square(optim_group["decay"])


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer class, options for it, and what it makes of a gradient and of a parameter (rows of longdouble)."""

    name: str
    cls: type
    options: dict[str, Any]
    grad: Callable[[np.ndarray], np.ndarray] | None = None
    param: Callable[[np.ndarray], np.ndarray] | None = None
    subtracts: bool = False  # the projection's error is measured against the datum's largest entry

    def build(self, params: Any, **more: Any) -> Any:
        options = {**self.options, **more}
        if not issubclass(self.cls, optim.ParamTransformingOptimizer) or self.name.endswith("FrankWolfe"):
            options.pop("InnerOpt", None)
        else:
            options.setdefault("InnerOpt", Idle)
        return self.cls(params, **options)


def _norm(p: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda g: ld.normalized(g, p)


CASES = [
    Case("ParamTransforming", optim.ParamTransformingOptimizer, {}),
    Case("L1Normed", optim.L1NormedGradientOptim, {}, grad=_norm(1)),
    Case("L2Normed", optim.L2NormedGradientOptim, {}, grad=_norm(2)),
    Case("LpNormed p=1.5", optim.LpNormedGradientOptim, {"p": 1.5}, grad=_norm(1.5)),
    Case("LpNormed p=3", optim.LpNormedGradientOptim, {"p": 3}, grad=_norm(3)),
    Case("LpNormed p=inf", optim.LpNormedGradientOptim, {"p": math.inf}, grad=_norm(math.inf)),
    Case("Signed", optim.SignedGradientOptim, {}, grad=np.sign),
    Case("TopQ", optim.TopQGradientOptimizer, {"q": 0.6}, grad=lambda g: ld.top_q(g, 0.6)),
    Case("L1qNormed", optim.L1qNormedGradientOptim, {"q": 0.6}, grad=lambda g: ld.signed_top_q(g, 0.6)),
    Case(
        "ClampedGradient",
        optim.ClampedGradientOptimizer,
        {"clamp_min": -0.5, "clamp_max": 2.0},
        grad=lambda g: ld.clamped(g, -0.5, 2.0),
    ),
    Case(
        "ClampedParameter",
        optim.ClampedParameterOptimizer,
        {"clamp_max": 0.25},
        param=lambda x: ld.clamped(x, None, 0.25),
    ),
    *(
        Case(f"{name} {epsilon:g}", cls, {"epsilon": epsilon}, grad, project(epsilon), subtracts)
        for epsilon in (0.75, 0.0)
        for name, cls, grad, project, subtracts in (
            ("L1Projected", optim.L1ProjectedOptim, _norm(1), lambda e: lambda x: ld.in_l1_ball(x, e), True),
            ("L2Projected", optim.L2ProjectedOptim, _norm(2), lambda e: lambda x: ld.in_l2_ball(x, e), False),
            ("LinfProjected", optim.LinfProjectedOptim, np.sign, lambda e: lambda x: ld.clamped(x, -e, e), False),
            ("L1Ball", optim.L1BallOptim, None, lambda e: lambda x: ld.in_l1_ball(x, e), True),
            ("L2Ball", optim.L2BallOptim, None, lambda e: lambda x: ld.in_l2_ball(x, e), False),
            ("LinfBall", optim.LinfBallOptim, None, lambda e: lambda x: ld.clamped(x, -e, e), False),
        )
    ),
    Case("Simplex", optim.SimplexOptim, {"total": 1.5}, param=lambda x: ld.on_simplex(x, 1.5), subtracts=True),
    Case("Sphere", optim.SphereOptim, {"epsilon": 1.5}, param=lambda x: ld.on_sphere(x, 1.5)),
    Case("Averaged", optim.AveragedGradientOptim, {"decay": 0.5}, grad=lambda g: g * ld.LD(0.5)),
    Case("L1FrankWolfe", optim.L1FrankWolfe, {"epsilon": 0.75}, grad=ld.l1_vertex),
    Case("L2FrankWolfe", optim.L2FrankWolfe, {"epsilon": 0.75}, grad=_norm(2)),
    Case("LinfFrankWolfe", optim.LinfFrankWolfe, {"epsilon": 0.75}, grad=np.sign),
    Case("L1qFrankWolfe", optim.L1qFrankWolfe, {"epsilon": 0.75, "q": 0.6}, grad=lambda g: ld.signed_top_q(g, 0.6)),
]
BY_NAME = {case.name: case for case in CASES}

# What acts on matrices has no datum of one dimension, and no oracle in 80-bit arithmetic: `test_spectral.py`.
MATRIX_CASES = [
    Case("Orthogonalized", optim.OrthogonalizedGradientOptim, {}),
    Case("Orthogonalized exactly", optim.OrthogonalizedGradientOptim, {"steps": None, "scale": 2.0}),
    Case("SpectralBall", optim.SpectralBallOptim, {"epsilon": 0.75}),
    Case("Stiefel", optim.StiefelOptim, {}),
    Case("SpectralFrankWolfe", optim.SpectralFrankWolfe, {"epsilon": 0.75}),
]
REMEMBERING_CASES = [
    Case("Averaged, Nesterov", optim.AveragedGradientOptim, {"decay": 0.95, "mix": 0.95}),
    Case("RootMeanSquare", RootMeanSquareOptim, {"decay": 0.8}),
]
ALL_CASES = CASES + MATRIX_CASES + REMEMBERING_CASES

SHAPES = [(), (0,), (5,), (1, 7), (4, 0), (0, 3), (3, 40), (2, 3, 4), (2, 0, 3), (2, 3, 4, 5), (2, 2, 3, 2, 3)]
MAGNITUDES = ["normal", "subnormal", "tiny", "huge", "largest", "wide", "ties", "few", "zeros"]
LAYOUTS = ["contiguous", "transposed", "channels_last", "sliced", "offset"]


def values(shape: tuple[int, ...], dtype: torch.dtype, magnitude: str, seed: int) -> Tensor:
    """Entries of one kind of magnitude; finite."""
    gen = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    normal = torch.randn(shape, generator=gen, dtype=torch.float64)
    if magnitude == "normal":
        x = normal
    elif magnitude == "subnormal":
        x = torch.randint(-3, 4, shape, generator=gen).double() * info.smallest_normal * info.eps
    elif magnitude == "tiny":
        x = normal * info.tiny * 4
    elif magnitude == "huge":
        x = (normal / 4).clamp(-1, 1) * info.max
    elif magnitude == "largest":
        x = normal.sign() * info.max
    elif magnitude == "wide":
        low, high = math.log2(info.smallest_normal * info.eps), math.log2(info.max)
        exponent = low + (high - low) * torch.rand(shape, generator=gen, dtype=torch.float64)
        x = normal.sign() * exponent.exp2()
    elif magnitude == "ties":
        x = torch.randint(-2, 3, shape, generator=gen).double() / 4
    elif magnitude == "few":
        x = normal * (torch.rand(shape, generator=gen) < 0.2)
    else:
        x = torch.zeros(shape, dtype=torch.float64)
    return x.clamp(-info.max, info.max).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced" and x.ndim:
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 9.0)
        buffer[..., 1::2] = x
        return buffer[..., 1::2]
    if layout == "offset":
        buffer = x.new_full((x.numel() + 3,), 9.0)
        buffer[3:] = x.reshape(-1)
        return buffer[3:].view(x.shape)
    return x.clone()


def stepped(case: Case, x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Take a step of an optimizer of one parameter; returns the gradient and the parameter after it."""
    param = x.detach().requires_grad_()
    param.grad = g
    case.build([param], **options).step()
    assert param.grad is g
    return g, param.detach()


def exact_step(case: Case, x: Tensor, g: Tensor, param_ndim: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """What `stepped` should give, as rows, and how many dimensions a datum has."""
    k = datum_ndim(x.ndim, param_ndim)
    grad, param = ld.rows_of(g, k), ld.rows_of(x, k)
    grad = grad if case.grad is None else case.grad(grad)
    if case.name.endswith("FrankWolfe"):  # the first step of the default schedule goes all the way
        param = grad * ld.LD(-case.options["epsilon"])
    elif case.param is not None:
        param = case.param(param)
    return grad, param, k
