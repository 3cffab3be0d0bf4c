"""Norms and normalization against 80-bit arithmetic, derivatives, vmap."""

from __future__ import annotations

import math
from typing import Any

import longdouble_oracles as ld
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import FLOATS, LAYOUTS, MAGNITUDES, SHAPES, laid_out, values

from rai_toolbox.functional import datum_ndim, lp_norm, normalize, normalize_

ORDERS = [1, 1.5, 2, 3, 7.25, math.inf]
ULPS = 8.0  # at p = 7.25; 4 for the ordinary orders: tests/optim/test_numerics.py


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from(MAGNITUDES),
    layout=st.sampled_from(LAYOUTS),
    p=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_norms_and_normalized_data_are_right_to_a_few_ulp(
    shape: tuple[int, ...], dtype: torch.dtype, magnitude: str, layout: str, p: float, seed: int, data: Any
) -> None:
    x = laid_out(values(shape, dtype, magnitude, seed), layout)
    param_ndim = data.draw(st.sampled_from([None, *range(-x.ndim, x.ndim + 1)]))
    k = datum_ndim(x.ndim, param_ndim)
    rows = ld.rows_of(x, k)
    norm = lp_norm(x, p, param_ndim=param_ndim)
    assert norm.shape == x.shape[: x.ndim - k]
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    largest = torch.finfo(norm.dtype).max
    exact = ld.norms(rows, p)
    fits = (exact <= largest).all()
    if fits:
        assert ld.error_in_ulp(norm.reshape(-1, 1), exact, 1) <= ULPS
    expected = ld.normalized(rows, p)
    assert ld.error_in_ulp(normalize(x, p, param_ndim=param_ndim), expected, k) <= ULPS
    assert normalize_(x, p, param_ndim=param_ndim) is x
    assert ld.error_in_ulp(x, expected, k) <= ULPS


def test_keepdim_keeps_the_dimensions_of_the_datum() -> None:
    x = torch.ones(2, 3, 4)
    for param_ndim, shape in ((None, (1, 1, 1)), (-1, (2, 1, 1)), (1, (2, 3, 1)), (0, (2, 3, 4))):
        assert lp_norm(x, param_ndim=param_ndim, keepdim=True).shape == shape


@pytest.mark.parametrize("function", [lp_norm, normalize, normalize_])
def test_arguments_out_of_range_are_refused(function: Any) -> None:
    x = torch.ones(2, 3)
    for p, error in ((0.5, ValueError), (math.nan, ValueError), (-1, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="`p`"):
            function(x, p)
    with pytest.raises(TypeError, match="floating"):
        function(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="param_ndim"):
        function(x, param_ndim=3)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_datum_has_the_norm_of_its_magnitudes(p: float, dtype: torch.dtype) -> None:
    for scale in (1e-30, 1.0, 1e30):
        x = torch.randn(3, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
        expected = x / torch.linalg.vector_norm(x, p, dim=1, keepdim=True)
        given_x = (x * scale).to(dtype)
        torch.testing.assert_close(normalize(given_x, p), expected.to(dtype))
        torch.testing.assert_close(normalize_(given_x.clone(), p), expected.to(dtype))
        assert not lp_norm(given_x, p).is_complex()


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_derivatives_are_right_at_every_scale(p: float) -> None:
    for scale in (1e-100, 1.0, 1e100):
        x = (
            torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
        ).requires_grad_()
        w = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad((normalize(x, p, eps=0.0) * w).sum(), x)
        y = (x.detach() / scale).requires_grad_()
        plain = y / torch.linalg.vector_norm(y, p, dim=1, keepdim=True)
        (expected,) = torch.autograd.grad((plain * w).sum(), y)
        torch.testing.assert_close(gradient * scale, expected)
    assert torch.autograd.gradcheck(lambda t: normalize(t, p), y)
    assert torch.autograd.gradcheck(lambda t: lp_norm(t, p), y)


def test_the_derivative_at_zero_is_finite() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    normalize(x, eps=1.0).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_it_maps_over_a_batch_with_vmap(p: float) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.func.vmap(lambda t: normalize(t, p))(x), normalize(x, p, param_ndim=1))
    torch.testing.assert_close(torch.func.vmap(lambda t: lp_norm(t, p, param_ndim=None))(x), lp_norm(x, p))


def test_a_list_is_normalized_like_its_tensors_one_by_one() -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = [(3, 40), (3, 40), (2, 3, 4), (7, 1), (0, 4), (3, 40), (2, 5000)]
    xs = [torch.randn(s, generator=gen).to(dtype) for s in shapes for dtype in (torch.float32, torch.float16)]
    alone = [normalize_(x.clone(), 2, scale=3.0) for x in xs]
    assert normalize_(xs, 2, scale=3.0) is xs
    for x, y in zip(xs, alone, strict=True):  # stacked, the sums of float32 run in another order
        torch.testing.assert_close(x, y, rtol=4 * torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_eps_bounds_the_divisor_and_zero_stays_zero(eps: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [3e-5, 4e-5], [3.0, 4.0]], dtype=dtype)
    exact = ld.normalized(ld.rows_of(x, 1), 2, eps)
    for result in (normalize(x, eps=eps), normalize_(x.clone(), eps=eps)):
        assert torch.equal(result[0], torch.zeros(2, dtype=dtype))
        assert ld.error_in_ulp(result, exact, 1) <= ULPS


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_datum(poison: float) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    clean = normalize(x)
    x[1, 3] = poison
    for result in (normalize(x), normalize_(x.clone())):
        torch.testing.assert_close(result[[0, 2, 3]], clean[[0, 2, 3]], rtol=1e-6, atol=0)
        assert result[1].isnan().any()
