"""Optimizers of matrices, beside SVD in float64 and torch's own Muon."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizer_cases import Idle
from torch import Tensor

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    OrthogonalizedGradientOptim,
    SpectralBallOptim,
    SpectralFrankWolfe,
    SphereOptim,
    StiefelOptim,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 0) -> Tensor:
    p = normal(*shape, seed=seed).requires_grad_()
    p.grad = normal(*shape, seed=seed + 1)
    return p


def svd_polar(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return u @ vh


def test_exact_gradients_are_polar_factors_of_every_matrix() -> None:
    shapes = [(6, 4), (4, 6), (6, 4), (3, 5, 2)]
    params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = [svd_polar(p.grad) for p in params]  # pyright: ignore[reportArgumentType]
    OrthogonalizedGradientOptim(params, Idle, steps=None, scale=3.0, grad_scale=0.5).step()
    for p, x in zip(params, expected, strict=True):
        assert torch.allclose(p.grad.double(), 1.5 * x, atol=1e-6)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("original", lambda m, n: math.sqrt(max(1, m / n))),
        ("match_rms_adamw", lambda m, n: 0.2 * math.sqrt(max(m, n))),
        ("spectral_unclamped", lambda m, n: math.sqrt(m / n)),
        (2.5, lambda m, n: 2.5),
    ],
)
def test_scales_are_those_of_muon(shape: tuple[int, int], scale: Any, factor: Any) -> None:
    p = parameter(*shape)
    OrthogonalizedGradientOptim([p], Idle, steps=None, scale=scale).step()
    sigma = torch.linalg.svdvals(p.grad)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(sigma, torch.full_like(sigma, factor(*shape)))


@pytest.mark.parametrize("nesterov_free_scale", ["original", "match_rms_adamw"])
def test_without_momentum_it_is_torchs_muon(nesterov_free_scale: str) -> None:
    muon = pytest.importorskip("torch.optim").__dict__.get("Muon")
    if muon is None:
        pytest.skip("this torch has no Muon")
    shapes = [(32, 32), (48, 32), (32, 48), (32, 32)]
    ours = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optim = OrthogonalizedGradientOptim(ours, lr=0.02, weight_decay=0.1, scale=nesterov_free_scale)
    reference = muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.0, nesterov=False, adjust_lr_fn=nesterov_free_scale)
    for step in range(10):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = normal(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        optim.step()
        reference.step()
        for p, q, b in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() <= 5e-4 * (q - b).norm()
            q.data.copy_(p.detach())


def test_fused_projections_are_orthogonalized_block_by_block() -> None:
    p = parameter(12, 4)
    expected = torch.cat([svd_polar(block) for block in p.grad.chunk(3)])  # pyright: ignore
    OrthogonalizedGradientOptim([{"params": [p], "row_blocks": 3}], Idle, steps=None).step()
    assert torch.allclose(p.grad.double(), expected, atol=1e-6)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ValueError, match="does not divide the 12 rows"):
        OrthogonalizedGradientOptim([p], Idle, row_blocks=5)
    with pytest.raises(ValueError, match="'spectral_unclamped', got 'muon'"):
        OrthogonalizedGradientOptim([p], Idle, scale="muon")


def test_frank_wolfe_stays_in_its_ball_and_reaches_the_optimum() -> None:
    target = normal(10, 6)
    x = torch.zeros(10, 6, requires_grad=True)
    optim = SpectralFrankWolfe([x], epsilon=3.0)
    best = -3 * torch.linalg.svdvals(target).sum()
    for _ in range(200):
        optim.zero_grad()
        (x * target).sum().backward()
        optim.step()
        assert torch.linalg.svdvals(x.detach().double()).max() <= 3 * (1 + 1e-6)
    assert (x * target).sum() <= 0.999 * best


def test_parameters_stay_where_they_should() -> None:
    ball, stiefel, sphere = parameter(5, 3), parameter(5, 3), parameter(5, 3)
    SpectralBallOptim([ball], lr=0.1, epsilon=1.0).step()
    StiefelOptim([stiefel], torch.optim.Adam, lr=0.1).step()
    SphereOptim([sphere], lr=0.1, epsilon=2.0).step()
    assert torch.linalg.svdvals(ball.detach()).max() <= 1 + 1e-6
    assert torch.allclose(stiefel.mT @ stiefel, torch.eye(3), atol=1e-6)
    assert torch.allclose(sphere.norm(dim=1), torch.full((5,), 2.0))


def test_links_of_a_chain_keep_their_matrices() -> None:
    p = parameter(4, 3)
    gradient = svd_polar(p.grad)  # pyright: ignore[reportArgumentType]
    chain = ChainedParamTransformingOptimizer(
        OrthogonalizedGradientOptim, StiefelOptim, params=[p], InnerOpt=torch.optim.SGD, lr=0.1, param_ndim=2
    )
    for group in chain.param_groups:
        group["steps"] = None
        group["scale"] = 1.0
    expected = svd_polar(p.detach().double() - 0.1 * gradient)
    chain.step()
    assert torch.allclose(p.detach().double(), expected, atol=1e-6)
