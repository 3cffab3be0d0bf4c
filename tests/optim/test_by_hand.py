"""Momentum and Nesterov after a transform, written out; and what has no meaning for complex numbers."""

from __future__ import annotations

import pytest
import torch

from rai_toolbox import functional as F
from rai_toolbox import optim


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_momentum_is_of_the_transformed_gradients_and_the_projection_comes_last(nesterov: bool, projected: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    param = x.clone().requires_grad_()
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    if projected:
        optimizer = optim.L2ProjectedOptim([param], epsilon=1.0, param_ndim=1, **settings)
    else:
        optimizer = optim.SignedGradientOptim([param], weight_decay=0.01, **settings)
    momentum = torch.zeros_like(x)
    for _ in range(6):
        grad = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        param.grad = grad.clone()
        optimizer.step()
        step = grad / grad.norm(dim=1, keepdim=True) if projected else grad.sign() + 0.01 * x
        momentum = 0.9 * momentum + step
        x = x - 0.1 * (step + 0.9 * momentum if nesterov else momentum)
        if projected:
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1.0)
    assert torch.allclose(param, x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.project_l1_ball(x, 1.0), lambda x: F.project_l2_ball(x, 1.0), lambda x: F.project_linf_ball(x, 1.0),
        lambda x: F.project_l0_ball(x, 1), F.project_simplex, lambda x: F.project_box(x, 0.0, 1.0),
        lambda x: F.top_q(x, 0.5), lambda x: F.signed_top_q(x, 0.5),
    ],
)  # fmt: skip
def test_complex_numbers_are_refused_in_a_sentence(function):
    with pytest.raises(TypeError, match="must be a real floating-point tensor"):
        function(torch.randn(2, 3, dtype=torch.complex64))
