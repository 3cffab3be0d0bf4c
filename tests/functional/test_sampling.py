"""Samples are in the ball in their own dtype, and uniform in it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.functional.tensor_layouts import DTYPES, SHAPES, as_rows, layouts, param_ndims

import rai_toolbox.functional as F

SAMPLERS = {1: F.uniform_like_l1_n_ball_, 2: F.uniform_like_l2_n_ball_, math.inf: F.uniform_like_linf_n_ball_}


@pytest.mark.parametrize("p", SAMPLERS)
@pytest.mark.parametrize("d", [1, 2, 7])
def test_samples_are_uniform_in_the_ball(p: float, d: int):
    generator = torch.Generator().manual_seed(d)
    x = SAMPLERS[p](torch.empty(20_000, d, dtype=torch.float64), 2.0, -1, generator)
    # In a uniform ball (norm / radius)^d is uniform on [0, 1], and the direction does not depend on it.
    radius = torch.linalg.vector_norm(x, p, 1) / 2
    assert stats.kstest((radius**d).numpy(), "uniform").pvalue > 1e-3
    inner, outer = x[radius < radius.median()], x[radius >= radius.median()]
    first = [(part[:, 0] / torch.linalg.vector_norm(part, p, 1)).numpy() for part in (inner, outer)]
    assert stats.ks_2samp(*first).pvalue > 1e-3
    # every coordinate has the same, symmetric, distribution
    assert stats.ks_2samp(x[:, 0].numpy(), -x[:, -1].numpy()).pvalue > 1e-3
    inside = x.new_empty(200_000, d).uniform_(-2, 2, generator=generator)
    inside = inside[torch.linalg.vector_norm(inside, p, 1) <= 2]  # the same by rejection
    if len(inside) > 500:
        assert stats.ks_2samp(x[:, 0].numpy(), inside[:, 0].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", SAMPLERS)
def test_samples_are_in_the_ball_in_their_own_dtype(p: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    for epsilon in (1.0, 1e-4, 3.0, 0.0):
        x = SAMPLERS[p](torch.full((2000, 2), math.nan, dtype=dtype), epsilon, -1, generator)
        norm = {1: lambda v: v.abs().sum(1), 2: lambda v: v.square().sum(1).sqrt(), math.inf: lambda v: v.abs().amax(1)}
        assert (norm[p](x.double()) <= epsilon * (1 + 1e-15)).all()
        assert epsilon == 0 or float(norm[p](x.double()).max()) > 0.9 * epsilon


@pytest.mark.parametrize("p", SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_strides_are_filled_in_place_with_the_same_points(p: float, shape: tuple[int, ...]):
    for param_ndim in param_ndims(len(shape)):
        expected = None
        for x in layouts(torch.full(shape, math.nan)).values():
            assert SAMPLERS[p](x, 1.0, param_ndim, torch.Generator().manual_seed(5)) is x
            assert not x.isnan().any()
            rows = as_rows(x, param_ndim)
            assert not x.numel() or (torch.linalg.vector_norm(rows.double(), p, 1) <= 1 + 1e-12).all()
            expected = x.clone() if expected is None else expected
            assert torch.equal(x, expected)


@pytest.mark.parametrize("p", SAMPLERS)
def test_a_radius_may_be_given_per_datum(p: float):
    radii = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    x = SAMPLERS[p](torch.empty(2, 3, 5), radii, 1, torch.Generator().manual_seed(0))
    unit = SAMPLERS[p](torch.empty(2, 3, 5), 1.0, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, unit * radii.unsqueeze(-1))


@pytest.mark.parametrize("p", SAMPLERS)
def test_a_leaf_that_requires_grad_is_filled_and_the_default_generator_is_used(p: float):
    x = torch.zeros(3, 4, requires_grad=True)
    torch.manual_seed(7)
    SAMPLERS[p](x)
    assert x.grad_fn is None
    assert x.requires_grad
    torch.manual_seed(7)
    np.testing.assert_array_equal(SAMPLERS[p](torch.zeros(3, 4)).numpy(), x.detach().numpy())
    state = torch.random.get_rng_state()
    SAMPLERS[p](x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("p", SAMPLERS)
def test_a_wrong_argument_is_named(p: float):
    with pytest.raises(ValueError, match="`epsilon` must be at least 0"):
        SAMPLERS[p](torch.empty(3, 4), -1.0)
    with pytest.raises(ValueError, match="`param_ndim` is 5"):
        SAMPLERS[p](torch.empty(3, 4), 1.0, 5)
    with pytest.raises(TypeError, match="real floating-point"):
        SAMPLERS[p](torch.zeros(3, dtype=torch.long))
