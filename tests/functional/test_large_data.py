"""One datum that is larger than the blocks that a step works on: the same results, by pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.functional.tensor_layouts import DTYPES

import rai_toolbox.functional as F
from rai_toolbox.functional import _large_scaling, _per_datum, normalize, project_l2_ball
from rai_toolbox.kernels import _large_projection, _large_selection, _scratch
from rai_toolbox.kernels._factors import NormFactor

SIZE = 2**21 + 3


def spread(dtype: torch.dtype, scale: float) -> torch.Tensor:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    return (x * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_norm_that_nobody_looks_at_scales_a_large_datum_of_any_dtype(dtype: torch.dtype, scale: float):
    x = spread(dtype, scale)
    for p in (1.5, 2):
        y = x.clone()
        assert _large_scaling.scale_large_datum_(y, NormFactor("normalize", p, 0.0))
        torch.testing.assert_close(y, normalize(x, p, param_ndim=None), rtol=4 * torch.finfo(dtype).eps, atol=0)
    for epsilon in (1e-4, 1.0):
        factor = NormFactor("ball", 2, epsilon)
        y = x.clone()
        assert _large_scaling.scale_large_datum_(y, factor)
        expected = project_l2_ball(x, epsilon, param_ndim=None)
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-45)
        again = y.clone()
        assert _large_scaling.scale_large_datum_(again, factor)
        assert torch.equal(again, y)


def test_a_large_datum_of_subnormal_halves_that_is_rounded_outside_its_ball_stays():
    x = torch.ones(SIZE, dtype=torch.float16)
    x[:100] = 3.7
    factor = NormFactor("ball", 2, 0.6 * 2.0**-24 * SIZE**0.5)  # 0.6 of the least number, which is the least number
    for _ in range(2):
        assert _large_scaling.scale_large_datum_(x, factor)
        assert x[[0, -1]].tolist() == [2 * 2.0**-24, 2.0**-24]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    """What is large, and is cut into pieces, is 40 entries, so that few suffice."""
    for module in (_per_datum, _scratch):
        monkeypatch.setattr(module, "WORK_NUMEL", 39)
    for module in (_scratch, _large_selection, _large_projection):
        monkeypatch.setattr(module, "PIECE_NUMEL", 16)


def values(kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(101, generator=generator)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "wide":
        x = x * 10 ** (6 * torch.rand(101, generator=generator) - 3)
    elif kind == "equal":
        x = torch.ones(101)
    elif kind == "zero":
        x = torch.zeros(101)
    elif kind == "not finite":
        x[[3, 50, 70]] = torch.tensor([math.inf, math.nan, -math.inf])
    return x.to(dtype)


KINDS = st.sampled_from(["normal", "ties", "wide", "equal", "zero", "not finite"])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_by_pieces_is_the_selection(dtype: torch.dtype):
    @settings(max_examples=60, deadline=None)
    @given(kind=KINDS, q=st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 1.0]), seed=st.integers(0, 99))
    def check(kind: str, q: float, seed: int):
        x = values(kind, dtype, seed)
        alike = {"rtol": torch.finfo(dtype).eps, "atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(F.top_q_(x.clone(), q, param_ndim=None), F.top_q(x, q, param_ndim=None), **alike)
        signed = F.signed_top_q(x, q, param_ndim=None, scale=3.0)
        torch.testing.assert_close(F.signed_top_q_(x.clone(), q, param_ndim=None, scale=3.0), signed, **alike)

    check()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_oracle_by_pieces_is_the_oracle(dtype: torch.dtype):
    for kind in ("normal", "ties", "wide", "equal", "zero", "not finite"):
        x = values(kind, dtype, 0)
        for radius in (3.0, torch.tensor([3.0])):
            for name in ("lmo_l1_ball", "lmo_l2_ball", "lmo_linf_ball", "lmo_l1q_ball"):
                q = (0.9,) if "q" in name else ()
                expected = getattr(F, name)(x, radius, *q, param_ndim=None)
                found = getattr(F, name + "_")(x.clone(), radius, *q, param_ndim=None)
                eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
                torch.testing.assert_close(found, expected, rtol=2 * eps, atol=least * eps, equal_nan=True)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_projection_by_pieces_is_the_projection(dtype: torch.dtype):
    @settings(max_examples=50, deadline=None)
    @given(
        kind=KINDS,
        set_=st.sampled_from(["l1", "l2", "linf", "simplex"]),
        box=st.sampled_from([None, "numbers", "tensors", "no zero"]),
        radius=st.sampled_from([1e-3, 0.7, 20.0, 1e6, torch.tensor(2.0)]),
        seed=st.integers(0, 99),
    )
    def check(kind: str, set_: str, box: str | None, radius: float | torch.Tensor, seed: int):
        x = values(kind, dtype, seed)
        options = {}
        if box == "numbers":
            options = {"lower": -0.25, "upper": None}
        elif box:
            wide = values("normal", dtype, seed + 1).abs()
            options = {"lower": -wide, "upper": torch.full((101,), 0.5, dtype=dtype)}
            if box == "no zero" and float(radius) > 1:
                options["lower"][5] = 0.25
        name = "project_simplex" if set_ == "simplex" else f"project_{set_}_ball"
        options = {} if set_ == "simplex" else options
        # in float64 and as one: what is found by pieces in float64 is rounded to the dtype at the end
        wide_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        expected = getattr(F, name)(x.double(), radius, param_ndim=None, **wide_options)
        most = torch.finfo(dtype).max  # what an infinite entry becomes whose bound is not a number of the dtype
        expected = torch.where(expected.isinf(), expected, expected.clamp(-most, most))
        found = x.clone()
        assert getattr(F, name + "_")(found, radius, param_ndim=None, **options) is found
        size = min(float(radius), float(expected.abs().nan_to_num(0).max()))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=2 * eps, atol=4 * eps * size, equal_nan=True)
        if kind != "not finite":
            again = found.clone()
            getattr(F, name + "_")(again, radius, param_ndim=None, **options)
            assert torch.equal(again, found)

    check()
