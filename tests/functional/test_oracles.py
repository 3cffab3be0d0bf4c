"""Linear minimization oracles: no point of the ball does better, and each has the shape that its ball asks for."""

from __future__ import annotations

import math

import pytest
import torch
from tests.functional.tensor_layouts import DTYPES, SHAPES, as_rows, layouts, param_ndims

import rai_toolbox.functional as F

ORACLES = {1: F.lmo_l1_ball, 2: F.lmo_l2_ball, math.inf: F.lmo_linf_ball}
IN_PLACE = {1: F.lmo_l1_ball_, 2: F.lmo_l2_ball_, math.inf: F.lmo_linf_ball_}
DUAL = {1: math.inf, 2: 2, math.inf: 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", ORACLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_oracle_reaches_the_dual_norm_within_the_ball(p: float, shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    g = torch.randn(shape).to(dtype)
    eps = torch.finfo(dtype).eps
    for param_ndim in param_ndims(len(shape)):
        s = ORACLES[p](g, 0.75, param_ndim=param_ndim)
        assert s.dtype == dtype
        for y in layouts(g).values():
            assert IN_PLACE[p](y, 0.75, param_ndim=param_ndim, negated=True) is y
            torch.testing.assert_close(y, -s, rtol=2 * eps, atol=0)
        if not g.numel():
            continue
        rows, points = as_rows(g, param_ndim).double(), as_rows(s, param_ndim).double()
        assert (torch.linalg.vector_norm(points, p, 1) <= 0.75 * (1 + 2 * eps)).all()
        reached = -(rows * points).sum(1)
        torch.testing.assert_close(reached, 0.75 * torch.linalg.vector_norm(rows, DUAL[p], 1), rtol=4 * eps, atol=0)


def test_l1_oracle_has_one_entry_per_datum_also_with_ties_and_zeros():
    g = torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [0.0, -2.0, 2.0]])
    expected = torch.tensor([[-3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    assert torch.equal(F.lmo_l1_ball(g, 3.0), expected)
    images = torch.ones(2, 3, 4, 4)
    assert ((F.lmo_l1_ball(images, 1.0) != 0).flatten(1).sum(1) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2_oracle_of_a_zero_datum_is_zero_and_of_any_size_is_on_the_sphere(dtype: torch.dtype):
    info = torch.finfo(dtype)
    g = torch.tensor([[0.0, 0.0], [info.max, -info.max], [info.smallest_normal * info.eps, 0.0]], dtype=dtype)
    s = F.lmo_l2_ball(g, 1.0).double()
    assert (s[0] == 0).all()
    torch.testing.assert_close(
        torch.linalg.vector_norm(s[1:], dim=1), torch.ones(2, dtype=torch.float64), rtol=info.eps, atol=0
    )


def test_l1q_oracle_spreads_the_radius_over_the_k_largest():
    torch.manual_seed(0)
    g = torch.randn(5, 100)
    s = F.lmo_l1q_ball(g, torch.arange(1.0, 6.0), 0.9)
    assert ((s != 0).sum(1) == 10).all()
    torch.testing.assert_close(s.abs().sum(1), torch.arange(1.0, 6.0))
    torch.testing.assert_close(-(s * g).sum(1), g.abs().topk(10).values.sum(1) / 10 * torch.arange(1.0, 6.0))
    torch.testing.assert_close(F.lmo_l1q_ball_(g.clone(), torch.arange(1.0, 6.0), 0.9, negated=True), -s)


@pytest.mark.parametrize("p", ORACLES)
def test_a_radius_may_be_given_per_datum(p: float):
    g = torch.randn(2, 3, 4)
    radii = torch.rand(2, 3)
    s = ORACLES[p](g, radii, param_ndim=1)
    torch.testing.assert_close(s, ORACLES[p](g, 1.0, param_ndim=1) * radii.unsqueeze(-1))
    with pytest.raises(ValueError, match="`epsilon` must be at least 0"):
        ORACLES[p](g, -1.0)


@pytest.mark.parametrize("p", ORACLES)
def test_nan_never_leaves_its_datum(p: float):
    g = torch.randn(3, 8)
    clean = ORACLES[p](g, 1.0)
    g[1, 2] = math.nan
    s = ORACLES[p](g, 1.0)
    assert s[1, 2] == 0 if p == math.inf else s[1].isnan().any()  # torch's sign of NaN is zero
    assert torch.equal(s[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("p", ORACLES)
def test_vmap_and_compile_give_the_same(p: float):
    g = torch.randn(4, 3, 5)

    def oracle(v: torch.Tensor) -> torch.Tensor:
        return ORACLES[p](v, 1.0, param_ndim=1)

    torch.testing.assert_close(torch.func.vmap(oracle)(g), oracle(g))
    torch.testing.assert_close(torch.compile(oracle, backend="eager", fullgraph=True)(g), oracle(g))


def test_l2_oracle_gradient_agrees_with_finite_differences():
    g = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: F.lmo_l2_ball(v, 2.0), (g,))
