"""Every optimizer class against 80-bit arithmetic: every dtype, magnitude, shape, stride and `param_ndim`."""

from __future__ import annotations

import math
from typing import Any

import longdouble_oracles as ld
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import (
    BY_NAME,
    CASES,
    FLOATS,
    LAYOUTS,
    MAGNITUDES,
    SHAPES,
    Case,
    Idle,
    exact_step,
    laid_out,
    stepped,
    values,
)

from rai_toolbox import optim

IDS = [case.name for case in CASES]

# What "within a few ulp" is here. Measured: docs/explanation/ulp.md.
ULPS = 4.0
# A point of float32 or float64 is left alone up to 4 eps outside a ball, which are up to 8 ulp, so that a second
# projection changes nothing; one of a half up to 0.52 eps, which are 1.04 ulp.
SLACK = {torch.float32: 4.0, torch.float64: 4.0}


def check_step(case: Case, x: torch.Tensor, g: torch.Tensor, param_ndim: int | None, ulps: float = ULPS) -> None:
    exact_grad, exact_param, k = exact_step(case, x, g, param_ndim)
    grad, param = stepped(case, x, g, param_ndim=param_ndim)
    assert ld.error_in_ulp(grad, exact_grad, k) <= ulps
    slack = 0.0 if case.param is None else SLACK.get(x.dtype, 0.0)
    assert ld.error_in_ulp(param, exact_param, k, of_datum=case.subtracts) <= ulps + slack


def param_ndims(ndim: int) -> list[int | None]:
    return [None, *range(-ndim, ndim + 1)]


@st.composite
def steps(draw: Any) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    dtype, shape = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(SHAPES))
    seed = draw(st.integers(0, 2**20))
    x = laid_out(values(shape, dtype, draw(st.sampled_from(MAGNITUDES)), seed), draw(st.sampled_from(LAYOUTS)))
    g = values(shape, dtype, draw(st.sampled_from(MAGNITUDES)), seed + 1)
    layout = draw(st.sampled_from([*LAYOUTS, "expanded"]))
    g = g[:1].expand(shape) if layout == "expanded" and g.ndim else laid_out(g, layout)
    return x, g, draw(st.sampled_from(param_ndims(len(shape))))


@pytest.mark.parametrize("case", CASES, ids=IDS)
@settings(deadline=None, max_examples=60)
@given(step=steps())
def test_a_step_is_right_to_a_few_ulp_whatever_the_dtype_magnitude_shape_and_strides(
    case: Case, step: tuple[torch.Tensor, torch.Tensor, int | None]
) -> None:
    check_step(case, *step)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_step_is_right_at_every_magnitude(case: Case, dtype: torch.dtype) -> None:
    for i, magnitude in enumerate(MAGNITUDES):
        g = values((3, 50), dtype, magnitude, i)
        for other in ("normal", magnitude):
            check_step(case, values((3, 50), dtype, other, i + 99), g.clone(), -1)


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "expanded"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_step_is_right_for_every_param_ndim_and_stride(case: Case, layout: str) -> None:
    shape = (2, 3, 4, 5)
    for param_ndim in param_ndims(4):
        x, g = values(shape, torch.float32, "normal", 1), values(shape, torch.float32, "normal", 2)
        if layout == "expanded":
            check_step(case, x, g[:1].expand(shape), param_ndim)
        else:
            check_step(case, laid_out(x, layout), laid_out(g, layout), param_ndim)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.param is not None], ids=[c.name for c in CASES if c.param is not None]
)
@pytest.mark.parametrize("size", [50, 5000])
def test_a_projection_lands_in_the_set_and_a_second_one_changes_nothing(
    case: Case, dtype: torch.dtype, size: int
) -> None:
    for magnitude in MAGNITUDES:
        x = values((2, size), dtype, magnitude, 3)
        _, once = stepped(case, x.clone(), torch.zeros_like(x))
        _, twice = stepped(case, once.clone(), torch.zeros_like(x))
        assert torch.equal(once, twice), magnitude


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["L1Ball 0.75", "L2Ball 0.75"])
def test_halves_that_are_rounded_outside_their_ball_stay(name: str, dtype: torch.dtype) -> None:
    # a few large entries, rounded alike, leave the ball; the small ones would follow them in again
    small = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)) / (64 if name[1] == "2" else 1)
    for epsilon in torch.linspace(0.5, 1, 60).tolist():
        x = torch.cat([torch.full((1, 3), 3.0), small + 2.5 * (name[1] == "1")], dim=1).to(dtype)
        _, once = stepped(BY_NAME[name], x, torch.zeros_like(x), epsilon=epsilon)
        _, twice = stepped(BY_NAME[name], once.clone(), torch.zeros_like(x), epsilon=epsilon)
        assert torch.equal(once, twice), epsilon


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["L1Projected 0.75", "L2Projected 0.75", "LinfProjected 0.75", "L1Ball 0.75"])
def test_a_point_inside_the_ball_stays_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    for magnitude in ("normal", "wide", "subnormal", "zeros", "ties"):
        x = values((3, 20), dtype, magnitude, 5)
        x = x.clamp(-1, 1) / 64
        x.flatten()[0] = -0.0
        _, after = stepped(BY_NAME[name], x.clone(), torch.ones_like(x))
        assert torch.equal(x, after)
        assert torch.equal(x.signbit(), after.signbit())


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_nan_or_infinity_stays_in_its_datum(case: Case, poison: float, dtype: torch.dtype) -> None:
    for magnitude in ("normal", "tiny", "huge"):
        x, g = values((5, 40), dtype, magnitude, 1), values((5, 40), dtype, magnitude, 2)
        clean_g, clean_x = stepped(case, x.clone(), g.clone())
        x[2, 7] = poison
        g[2, 3] = poison
        grad, param = stepped(case, x, g)
        others = [0, 1, 3, 4]
        assert torch.equal(grad[others], clean_g[others])
        # a row outside may send its batch through the more exact of two ways
        few_ulp = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).smallest_normal}
        torch.testing.assert_close(param[others], clean_x[others], **few_ulp)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("L1Ball 0.75", [[0.0, -0.75, 0.0], [0.0, 0.0, 0.25]]),
        ("L2Ball 0.75", [[0.0, -0.75, 0.0], [0.0, 0.0, 0.25]]),
        ("LinfBall 0.75", [[0.5, -0.75, 0.75], [0.0, 0.0, 0.25]]),
    ],
)
def test_a_projection_of_an_infinite_entry_is_finite(name: str, expected: list[list[float]]) -> None:
    x = torch.tensor([[0.5, -math.inf, 3.0], [0.0, 0.0, 0.25]])
    _, param = stepped(BY_NAME[name], x, torch.zeros_like(x))
    assert torch.equal(param, torch.tensor(expected))


@pytest.mark.parametrize("cls", [optim.L1NormedGradientOptim, optim.L2NormedGradientOptim], ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-300, 1e-38, 0.25, 3.0, 1e30])
@pytest.mark.parametrize("scale", [1.0, -10.0, 1e6, 1e-6, 0.0])
def test_zero_stays_zero_and_the_bound_of_the_divisor_holds(
    cls: type, dtype: torch.dtype, eps: float, scale: float
) -> None:
    g = torch.tensor([[0.0, 0.0], [1e-7, 0.0], [0.5, 0.5], [100.0, -50.0]], dtype=dtype)
    exact = ld.normalized(ld.rows_of(g, 1), 1 if cls is optim.L1NormedGradientOptim else 2, eps) * ld.LD(scale)
    exact = np.clip(exact, -torch.finfo(dtype).max, torch.finfo(dtype).max)
    x = torch.zeros_like(g).requires_grad_()
    x.grad = g
    cls([x], Idle, div_by_zero_eps=eps, grad_scale=scale).step()
    assert torch.equal(g[0], torch.zeros(2, dtype=dtype))
    finite = g.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert ld.error_in_ulp(finite, exact, 1) <= ULPS


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("magnitude", [1e-35, 1e-25, 1e-5, 1.0, 1e10, 1e25, 1e35])
@pytest.mark.parametrize("p", [1, 2])
def test_a_scale_out_of_the_ordinary_loses_no_digits(p: int, magnitude: float, scale: float) -> None:
    g = torch.tensor([[3.0, -4.0, 1.0], [1.0, 0.0, 0.0]]) * magnitude
    exact = ld.normalized(ld.rows_of(g, 1), p) * ld.LD(scale)
    x = torch.zeros_like(g).requires_grad_()
    x.grad = g
    optim.LpNormedGradientOptim([x], Idle, p=p, grad_scale=scale).step()
    assert ld.error_in_ulp(g, exact, 1) <= ULPS


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["L1Ball 0.75", "L2Ball 0.75", "LinfBall 0.75"])
@pytest.mark.parametrize("epsilon", [1e-40, 1e-30, 1e-7, 1e-4, 0.1, 7.0, 1e5, 1e30, 1e300, math.inf])
def test_a_ball_of_any_radius(name: str, dtype: torch.dtype, epsilon: float) -> None:
    project = {"L1": ld.in_l1_ball, "L2": ld.in_l2_ball, "Li": lambda x, e: ld.clamped(x, -e, e)}[name[:2]]
    for magnitude in ("normal", "tiny", "huge", "wide", "zeros"):
        x = values((3, 30), dtype, magnitude, 8)
        exact = project(ld.rows_of(x, 1), epsilon)
        param = x.clone().requires_grad_()
        param.grad = torch.ones_like(x)
        BY_NAME[name].build([param], epsilon=epsilon).step()
        assert ld.error_in_ulp(param, exact, 1, of_datum=BY_NAME[name].subtracts) <= ULPS, magnitude


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tensor", [torch.tensor([0.5, 0.0, 2.0]), torch.tensor(0.5), torch.tensor([0.5])], ids=str)
@pytest.mark.parametrize(
    "name",
    ["L1Projected 0.75", "L2Projected 0.75", "LinfProjected 0.75", "L1Ball 0.75", "L2Ball 0.75", "LinfBall 0.75"],
)
def test_a_tensor_epsilon_holds_one_radius_per_datum(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    x = values((3, 30), dtype, "normal", 8)
    radii = tensor.expand(3).double().numpy()[:, None]
    project = {"L1": ld.in_l1_ball, "L2": ld.in_l2_ball, "Li": lambda x, e: ld.clamped(x, -e, e)}[name[:2]]
    exact = project(ld.rows_of(x, 1), radii)
    param = x.clone().requires_grad_()
    param.grad = torch.ones_like(x)
    BY_NAME[name].build([param], epsilon=tensor, param_ndim=-1).step()
    assert ld.error_in_ulp(param, exact, 1, of_datum=BY_NAME[name].subtracts) <= ULPS


@pytest.mark.parametrize("cls", [optim.L1FrankWolfe, optim.L2FrankWolfe, optim.LinfFrankWolfe])
def test_a_tensor_epsilon_of_frank_wolfe_holds_one_radius_per_datum(cls: type) -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    x.grad = torch.ones(3, 4)
    cls([x], epsilon=torch.tensor([0.5, 0.0, 2.0])).step()
    p = {optim.L1FrankWolfe: 1, optim.L2FrankWolfe: 2, optim.LinfFrankWolfe: math.inf}[cls]
    torch.testing.assert_close(torch.linalg.vector_norm(x.detach(), p, dim=1), torch.tensor([0.5, 0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e10, 1e30, 1e38])
@pytest.mark.parametrize("name", ["Simplex", "L1Ball 0.75"])
def test_a_long_row_in_ascending_order_is_projected_right(name: str, scale: float, dtype: torch.dtype) -> None:
    x = torch.linspace(-0.9, 0.9, 5000, dtype=torch.float64).mul(scale).to(dtype)[None]
    check_step(BY_NAME[name], x, torch.ones_like(x), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("scale", ["normal", "equal", "small", "large"])
def test_a_long_row_keeps_its_digits(p: float, dtype: torch.dtype, scale: str) -> None:
    for size in (1000, 5000, 100_003):  # in pieces of equal length, and not
        g = torch.randn(1, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
        if scale == "equal":
            g = torch.full_like(g, 0.1)
        elif scale != "normal":  # near the ends of the range in which a norm is computed directly
            decades = (250 if dtype == torch.float64 else 20) / p
            g = g * 10 ** (decades if scale == "large" else -decades)
        x = torch.zeros_like(g).requires_grad_()
        x.grad = g.clone()
        optim.LpNormedGradientOptim([x], Idle, p=p).step()
        assert ld.error_in_ulp(x.grad, ld.normalized(ld.rows_of(g, 1), p), 1) <= ULPS


def test_two_million_entries_of_float32_keep_their_digits() -> None:
    g = torch.randn(1, 2_000_000, generator=torch.Generator().manual_seed(0))
    for p in (1, 2):
        x = torch.zeros_like(g).requires_grad_()
        x.grad = g.clone()
        optim.LpNormedGradientOptim([x], Idle, p=p).step()
        assert ld.error_in_ulp(x.grad, ld.normalized(ld.rows_of(g, 1), p), 1) <= ULPS


def test_top_q_keeps_exactly_k_of_equal_entries() -> None:
    for count, q in ((7, 0.3), (1000, 0.99), (5000, 0.5)):
        for dtype in FLOATS:
            x = torch.zeros(2, count, dtype=dtype, requires_grad=True)
            x.grad = torch.ones(2, count, dtype=dtype)
            optim.TopQGradientOptimizer([x], Idle, q=q).step()
            assert (x.grad != 0).sum(1).tolist() == [round((1 - q) * count)] * 2
