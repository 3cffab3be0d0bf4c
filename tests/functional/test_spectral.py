"""The polar factor, the spectral ball and the sphere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from rai_toolbox.functional import (
    lmo_spectral_ball,
    lmo_spectral_ball_,
    polar,
    polar_,
    project_l2_sphere,
    project_l2_sphere_,
    project_spectral_ball,
    project_spectral_ball_,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (24, 10), (10, 24)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def matrix(m: int, n: int, condition: float = 10.0, seed: int = 0) -> Tensor:
    """A float64 matrix with singular values from 1 down to 1 / condition."""
    gen = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, m, generator=gen, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64))
    r = min(m, n)
    sigma = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return u[:, :r] * sigma @ v[:, :r].mT


def svd_polar(a: Tensor, rank: int | None = None) -> Tensor:
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return u[..., :rank] @ vh[..., :rank, :]


def relative_error(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_polar_agrees_with_a_float64_svd(shape: tuple[int, int], condition: float, dtype: torch.dtype) -> None:
    a = matrix(*shape, condition if dtype.itemsize > 2 else min(condition, 10.0)).to(dtype)
    assert relative_error(polar(a), svd_polar(a)) <= {2: torch.finfo(dtype).eps, 4: 1e-7, 8: 1e-10}[dtype.itemsize]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(-38, 38), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_polar_of_any_magnitude_is_an_isometry_along_the_matrix(
    dtype: torch.dtype, exponent: int, m: int, n: int, seed: int
) -> None:
    low, high = (-4, 3) if dtype == torch.float16 else (-37, 37)
    a = (matrix(m, n, seed=seed) * 10.0 ** max(low, min(high, exponent))).to(dtype)
    x = polar(a).double()
    gram = x @ x.mT if m <= n else x.mT @ x
    tolerance = 20 * torch.finfo(dtype).eps
    assert (gram - torch.eye(min(m, n))).abs().max() <= tolerance
    p = (x.mT if m > n else x) @ (a.mT if m <= n else a).double()  # symmetric: A = P X
    assert (p - p.mT).abs().max() <= tolerance * p.abs().max()


def test_a_matrix_without_full_rank_has_a_partial_isometry_and_zero_has_zero() -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(20, 3, generator=gen) @ torch.randn(3, 30, generator=gen)
    assert relative_error(polar(a), svd_polar(a, 3)) < 1e-6
    assert polar(torch.zeros(3, 4)).count_nonzero() == 0
    assert polar(torch.zeros(3, 4), steps=5).count_nonzero() == 0
    assert polar(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("steps", [None, 5])
def test_a_nan_stays_in_its_matrix(steps: int | None) -> None:
    a = torch.stack([matrix(4, 3), matrix(4, 3, seed=1), matrix(4, 3, seed=2)]).float()
    expected = polar(a[1:], steps=steps)
    a[0, 0, 0], a[2, 0, 0] = math.nan, math.inf
    result = polar(a, steps=steps)
    assert result[0].isnan().all()
    assert torch.equal(result[1], expected[0])
    assert not result[2].isfinite().any()


def test_what_a_matrix_is_follows_param_ndim_and_row_blocks() -> None:
    x = matrix(12, 12, seed=3).reshape(12, 3, 4)
    assert torch.allclose(polar(x, param_ndim=None), svd_polar(x.reshape(12, 12)).reshape(x.shape))
    assert torch.allclose(polar(x), svd_polar(x))
    blocks = polar(x.reshape(12, 12), row_blocks=3)
    assert torch.allclose(blocks, svd_polar(x.reshape(3, 4, 12)).reshape(12, 12))
    assert torch.equal(polar(x, param_ndim=0), x.sign())
    channels_last = matrix(8, 27, seed=4).reshape(8, 3, 3, 3).to(memory_format=torch.channels_last)
    expected = polar(channels_last.contiguous(), param_ndim=None)
    assert torch.allclose(polar_(channels_last, param_ndim=None), expected)


@pytest.mark.parametrize(("m", "n"), [(32, 32), (48, 16), (16, 48)])
def test_newton_schulz_is_that_of_torch(m: int, n: int) -> None:
    muon = pytest.importorskip("torch.optim._muon")
    a = torch.stack([matrix(m, n, seed=s).float() for s in range(2)])
    expected = torch.stack(
        [muon._zeropower_via_newtonschulz(x.clone(), (3.4445, -4.7750, 2.0315), 5, 1e-7) for x in a]
    ).float()
    assert relative_error(polar(a, steps=5), expected.double()) < 5e-4
    assert relative_error(polar(a[0], steps=5), expected[0].double()) < 5e-4


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_newton_schulz_does_not_see_the_scale(scale: float) -> None:
    a = matrix(8, 6).float()
    a = a / a.abs().max() * scale
    sigma = torch.linalg.svdvals(polar(a, steps=5))
    assert sigma.min() > 0.4
    assert sigma.max() < 1.4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectral_projection_clips_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = (2 * matrix(*shape, 1e2)).to(dtype)
    u, sigma, vh = torch.linalg.svd(a.double(), full_matrices=False)
    for epsilon in (0.0, 1e-3, 0.5, 1.0):
        z = project_spectral_ball(a, epsilon)
        expected = u * sigma.clamp_max(epsilon) @ vh
        digits = torch.finfo(dtype).eps * (8 + 2 * max(shape) if dtype == torch.float64 else 2 + math.sqrt(min(shape)))
        assert (z.double() - expected).abs().max() <= digits * max(epsilon, 1e-10)
        assert torch.linalg.svdvals(z.double()).max() <= epsilon * (1 + digits)
        assert torch.equal(project_spectral_ball(z, epsilon), z)
    assert torch.equal(project_spectral_ball(a, 3.0), a)
    assert torch.equal(project_spectral_ball_(a.clone(), 0.5), project_spectral_ball(a, 0.5))


def test_radii_per_datum() -> None:
    a = torch.stack([matrix(4, 5, seed=s) for s in range(3)])
    radii = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64)
    sigma = torch.linalg.svdvals(project_spectral_ball(a, radii))
    assert torch.allclose(sigma.amax(1), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    assert torch.equal(project_spectral_ball_(a.clone(), radii), project_spectral_ball(a, radii))
    s = lmo_spectral_ball(a, radii)
    assert torch.allclose((a * s).sum((1, 2)), -radii * torch.linalg.svdvals(a).sum(1))  # -ε times the dual norm
    assert torch.equal(lmo_spectral_ball_(a.clone(), radii, negated=True), -s + 0.0)
    with pytest.raises(ValueError, match="one entry per datum"):
        project_spectral_ball(a, torch.ones(2))


def test_derivatives_agree_with_finite_differences() -> None:
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    radii = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    assert gradcheck(polar, (a,))
    assert gradcheck(lambda x: polar(x.mT), (a,))
    assert gradcheck(project_spectral_ball, (a, radii))
    assert gradcheck(lmo_spectral_ball, (a, radii))
    assert gradcheck(project_l2_sphere, (a, radii))
    equal = torch.eye(3, dtype=torch.float64, requires_grad=True)  # no gap between singular values
    assert gradcheck(polar, (equal,))
    assert gradcheck(lambda x: project_spectral_ball(x, 0.5), (equal,))
    flat = torch.randn(3, 5, generator=gen, dtype=torch.float64)
    flat[2] = flat[1]  # rank 2: what is clipped does not see the third
    assert gradcheck(lambda x: project_spectral_ball(x, 0.6), (flat.requires_grad_(),))


def test_vmap_is_the_batch() -> None:
    a = torch.stack([matrix(3, 4, seed=s) for s in range(4)]).float()
    for function in (polar, lambda x: project_spectral_ball(x, 0.5), lambda x: project_l2_sphere(x, 0.5, param_ndim=2)):
        assert torch.allclose(torch.func.vmap(function)(a), function(a))
    grad = torch.func.grad(lambda x: polar(x).pow(3).sum())
    assert torch.allclose(torch.func.vmap(grad)(a)[1], grad(a[1]), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(-30, 30))
def test_the_sphere_is_reached_and_kept(dtype: torch.dtype, seed: int, length: int, exponent: int) -> None:
    low, high = (-3, 3) if dtype == torch.float16 else (-30, 30)
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(3, length, generator=gen, dtype=torch.float64) * 10.0 ** max(low, min(high, exponent))
    x = x.to(dtype)
    z = project_l2_sphere(x, 2.0)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (z.double().norm(dim=1) - 2).abs().max() <= 2 * tolerance
    assert torch.allclose(z.double(), 2 * x.double() / x.double().norm(dim=1, keepdim=True), rtol=tolerance, atol=0)
    assert torch.equal(project_l2_sphere(z, 2.0), z)
    assert torch.equal(project_l2_sphere_(x.clone(), 2.0), z)


def test_a_zero_datum_goes_to_the_first_axis_of_the_sphere() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [math.nan, 1.0]])
    z = project_l2_sphere(x)
    assert z[0].tolist() == [1.0, 0.0]
    assert z[1].tolist() == pytest.approx([0.6, 0.8])
    assert z[2].isnan().any()
    assert project_l2_sphere(x[1], 0.0, param_ndim=None).tolist() == [0.0, 0.0]


def test_one_large_datum_reaches_the_sphere_by_pieces() -> None:
    x = torch.randn(1, 2**20 + 5, generator=torch.Generator().manual_seed(0))
    assert project_l2_sphere_(x, 3.0).double().norm().item() == pytest.approx(3.0, rel=1e-6)
    zero = torch.zeros(1, 2**20 + 5)
    assert project_l2_sphere_(zero, 3.0).norm().item() == 3.0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 0}, ValueError, "at least 1"),
        ({"steps": 2.0}, TypeError, "must be an int or None"),
        ({"row_blocks": 2}, ValueError, "does not divide the 3 rows"),
        ({"row_blocks": True}, TypeError, "must be an int"),
        ({"param_ndim": 3}, ValueError, "param_ndim"),
    ],
)
def test_errors_say_what_is_allowed(options: dict[str, object], error: type[Exception], words: str) -> None:
    for function in (polar, polar_):
        with pytest.raises(error, match=words):
            function(torch.ones(3, 2), **options)  # pyright: ignore
    with pytest.raises(TypeError, match="real floating-point"):
        polar(torch.ones(3, 2, dtype=torch.int64))
