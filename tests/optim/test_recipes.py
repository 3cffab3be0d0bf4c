"""The recipes of docs/how-to/recipes.md, against torch's own optimizers or the formulas in float64."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from same_steps import gradient, parameter, step
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    JointOptimizer,
    L1NormedGradientOptim,
    L2NormedGradientOptim,
    LinfBallOptim,
    OrthogonalizedGradientOptim,
    SignedGradientOptim,
    SphereOptim,
)
from rai_toolbox.perturbations import gradient_ascent


def polar_factor(a: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def test_lion_by_hand() -> None:
    beta1, beta2, lr, weight_decay = 0.9, 0.99, 0.01, 0.1
    ours, theirs = parameter(4, 6, dtype=torch.float64), parameter(4, 6, dtype=torch.float64)
    optim = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=beta2, mix=beta1 / beta2),
        SignedGradientOptim,
        params=[ours],
        lr=lr,
        weight_decay=weight_decay,
    )
    mean = torch.zeros_like(theirs)
    with torch.no_grad():
        for t in range(50):
            g = gradient(theirs.shape, 10 * t, torch.float64)
            step(optim, t)
            theirs.sub_(lr * ((beta1 * mean + (1 - beta1) * g).sign() + weight_decay * theirs))
            mean = beta2 * mean + (1 - beta2) * g
    assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)


def test_signum_by_hand() -> None:
    ours, theirs = parameter(4, 6), parameter(4, 6)
    optim = ChainedParamTransformingOptimizer(AveragedGradientOptim, SignedGradientOptim, params=[ours], lr=0.01)
    mean = torch.zeros_like(theirs)
    with torch.no_grad():
        for t in range(50):
            step(optim, t)
            mean.lerp_(gradient(theirs.shape, 10 * t), 1 - 0.9)
            theirs.sub_(mean.sign(), alpha=0.01)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_a_chain(nesterov: bool) -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    shapes = [(32, 32), (64, 32), (32, 64), (32, 32)]
    ours = [gradient(shape, 500 + i).requires_grad_() for i, shape in enumerate(shapes)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optim = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.95, mix=0.95 if nesterov else 1.0),
        partial(OrthogonalizedGradientOptim, scale="match_rms_adamw"),
        params=ours,
        InnerOpt=SGD,
        lr=0.02,
        weight_decay=0.1,
        param_ndim=2,
    )
    reference = muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    start = [p.detach().clone() for p in theirs]
    for t in range(50):
        step(optim, t)
        step(reference, t)
    for p, q, first in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() <= 5e-4 * (q - first).norm()


def test_mi_fgsm_through_gradient_ascent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 0])
    optimizer = partial(
        ChainedParamTransformingOptimizer,
        L1NormedGradientOptim,
        partial(AveragedGradientOptim, decay=1.0, weight=1.0),
        SignedGradientOptim,
        partial(LinfBallOptim, epsilon=0.25),
    )
    found, _ = gradient_ascent(model=model, data=x, target=y, optimizer=optimizer, lr=0.1, steps=7)
    delta, momentum = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(7):
        delta.requires_grad_()
        loss = nn.functional.cross_entropy(model(x + delta), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, delta)
        momentum = momentum + g / g.abs().sum(1, keepdim=True)
        delta = (delta + 0.1 * momentum.sign()).clamp(-0.25, 0.25).detach()
    assert torch.allclose(found, x + delta, rtol=1e-14, atol=0)


def test_normalized_sgd_with_momentum_by_hand() -> None:
    ours, theirs = parameter(4, 6, dtype=torch.float64), parameter(4, 6, dtype=torch.float64)
    optim = ChainedParamTransformingOptimizer(
        AveragedGradientOptim, L2NormedGradientOptim, params=[ours], lr=0.01, param_ndim=None
    )
    mean = torch.zeros_like(theirs)
    with torch.no_grad():
        for t in range(20):
            step(optim, t)
            mean = 0.9 * mean + 0.1 * gradient(theirs.shape, 10 * t, torch.float64)
            theirs -= 0.01 * mean / mean.norm()
    assert torch.allclose(ours, theirs, rtol=1e-13)


def test_muon_and_adamw_as_one_are_torchs_two() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    ours, theirs = [[parameter(16, 32), parameter(24, 8), parameter(7), parameter(5)] for _ in range(2)]
    optim = JointOptimizer(
        ChainedParamTransformingOptimizer(
            partial(AveragedGradientOptim, decay=0.95, mix=0.95),
            partial(OrthogonalizedGradientOptim, scale="match_rms_adamw"),
            params=ours[:2],
            lr=0.02,
            weight_decay=0.1,
            param_ndim=2,
        ),
        AdamW(ours[2:], lr=0.003),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=20)
    members = muon(theirs[:2], lr=0.02, adjust_lr_fn="match_rms_adamw"), AdamW(theirs[2:], lr=0.003)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(member, T_max=20) for member in members]
    start = [p.detach().clone() for p in theirs]
    for t in range(20):
        step(optim, t)
        scheduler.step()
        for member, its in zip(members, schedulers, strict=True):
            step(member, t)
            its.step()
    for p, q, first in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() <= 5e-4 * (q - first).norm()


def test_scion_is_its_formula() -> None:
    lr, decay = 0.02, 0.9
    hidden, last = parameter(8, 4, dtype=torch.float64), parameter(3, 8, dtype=torch.float64)
    momentum = partial(AveragedGradientOptim, decay=decay)
    optim = JointOptimizer(
        ChainedParamTransformingOptimizer(
            momentum,
            partial(OrthogonalizedGradientOptim, scale="spectral_unclamped", steps=None),
            params=[hidden],
            lr=lr,
            param_ndim=2,
        ),
        ChainedParamTransformingOptimizer(momentum, SignedGradientOptim, params=[last], lr=lr, grad_scale=1 / 8),
    )
    w, v = hidden.detach().clone(), last.detach().clone()
    m, n = torch.zeros_like(w), torch.zeros_like(v)
    for t in range(20):
        step(optim, t)
        m = decay * m + (1 - decay) * gradient(w.shape, 10 * t, torch.float64)
        n = decay * n + (1 - decay) * gradient(v.shape, 10 * t, torch.float64)
        w -= lr * (8 / 4) ** 0.5 * polar_factor(m)
        v -= lr * n.sign() / 8
    assert torch.allclose(hidden, w, rtol=1e-12, atol=1e-13)
    assert torch.allclose(last, v, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_hyperball_is_its_formula(orthogonal: bool) -> None:
    lr, decay = 0.05, 0.95
    p = parameter(6, 4, dtype=torch.float64)
    radius = p.detach().norm().item()
    links = [partial(OrthogonalizedGradientOptim, steps=None)] if orthogonal else []
    optim = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=decay, mix=decay),
        *links,
        partial(L2NormedGradientOptim, param_ndim=None),
        partial(SphereOptim, param_ndim=None),
        params=[{"params": [p], "epsilon": radius, "grad_scale": radius}],
        lr=lr,
        param_ndim=2,
    )
    w, m = p.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    for t in range(20):
        step(optim, t)
        g = gradient(w.shape, 10 * t, torch.float64)
        m = decay * m + (1 - decay) * g
        u = decay * m + (1 - decay) * g
        u = polar_factor(u) if orthogonal else u
        w = w - lr * radius * u / u.norm()
        w = radius * w / w.norm()
    assert torch.allclose(p, w, rtol=1e-11, atol=1e-12)
    assert abs(p.detach().norm().item() - radius) <= 1e-14 * radius


def test_a_character_transformer_ends_at_the_loss_of_torchs_optimizers() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    root = Path(__file__).parents[2]
    path = root / "bench" / "characters.py"
    spec = importlib.util.spec_from_file_location("characters", path)
    assert spec is not None
    assert spec.loader is not None
    characters = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(characters)
    # The license does not change as the docs do. Both round to bfloat16 on the way, in orders of their own: in eight
    # runs their losses lay .00003 apart at most, and those of another mix of the momentum .0002 to .0008.
    data = characters.text([root / "LICENSE"])
    makes = (characters.recipe, characters.torchs, partial(characters.recipe, mix=0.9))
    ours, theirs, other = (characters.final_loss(make, 20, 1, data) for make in makes)
    assert abs(ours - theirs) <= 2e-4 < abs(other - theirs)
