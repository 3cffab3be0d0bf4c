"""Top-q keeps exactly the k largest entries, whatever the values, the dtype and the strides."""

from __future__ import annotations

import math
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from tests.functional.tensor_layouts import DTYPES, SHAPES, as_rows, layouts, param_ndims
from torch.utils._python_dispatch import TorchDispatchMode

import rai_toolbox.functional as F
from rai_toolbox.functional import _selection


def by_sorting(x: torch.Tensor, q: float, param_ndim: int | None) -> torch.Tensor:
    rows = as_rows(x, param_ndim)
    k = round((1 - q) * rows.shape[1])
    magnitude = rows.double().abs()
    magnitude[magnitude.isnan()] = math.inf
    order = magnitude.sort(dim=1, descending=True, stable=True).indices[:, :k]
    z = torch.zeros_like(rows).scatter(1, order, rows.gather(1, order))
    return z.reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_top_q_is_what_a_stable_sort_keeps_for_any_strides_and_param_ndim(shape: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    for param_ndim in param_ndims(len(shape)):
        for q in (0.0, 0.5, 0.9, 1.0):
            expected = by_sorting(x, q, param_ndim)
            assert torch.equal(F.top_q(x, q, param_ndim=param_ndim), expected)
            for y in layouts(x).values():
                assert F.top_q_(y, q, param_ndim=param_ndim) is y
                assert torch.equal(y, expected)


@settings(max_examples=100, deadline=None)
@given(
    data=hnp.arrays("float32", st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.floats(width=32)),
    q=st.floats(0, 1),
)
def test_top_q_of_any_floats_is_what_a_stable_sort_keeps(data, q: float):
    x = torch.from_numpy(data)
    z = F.top_q(x, q)
    torch.testing.assert_close(z, by_sorting(x, q, -1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(F.top_q_(x.clone(), q), z, rtol=0, atol=0, equal_nan=True)


DISTRIBUTIONS = {
    "normal": lambda shape: torch.randn(shape),
    "laplace": lambda shape: torch.distributions.Laplace(0.0, 1.0).sample(shape),
    "heavy tails": lambda shape: torch.distributions.StudentT(1.0).sample(shape),
    "uniform": lambda shape: torch.rand(shape),
    "nearly all zero": lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.05),
    "few values": lambda shape: torch.randn(shape).mul(3).round(),
    "all equal": lambda shape: torch.ones(shape),
    "zero": lambda shape: torch.zeros(shape),
    "sixty decades": lambda shape: torch.randn(shape) * 10 ** (60 * torch.rand(shape) - 30),
    "subnormal": lambda shape: torch.randn(shape) * 1e-43,
    "huge": lambda shape: torch.rand(shape) * 3e38,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("q", [0.5, 0.9, 0.999])
def test_top_q_of_long_rows_keeps_exactly_k_of_any_distribution(name: str, q: float):
    torch.manual_seed(0)
    x = DISTRIBUTIONS[name]((12, 1500))
    expected = by_sorting(x, q, -1)
    assert torch.equal(F.top_q(x, q), expected)
    assert torch.equal(F.top_q_(x.clone(), q), expected)
    signed = F.signed_top_q_(x.clone(), q, scale=2.0)
    kept = (expected != 0).sum(1, keepdim=True)
    torch.testing.assert_close(signed, expected.sign() * (2 / kept.clamp_min(1)))
    assert torch.equal(F.signed_top_q(x, q, scale=2.0), signed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_top_q_has_l1_norm_scale_in_every_dtype(dtype: torch.dtype):
    x = torch.randn(6, 4000).to(dtype)
    for q in (0.0, 0.9, 0.9997):
        z = F.signed_top_q_(x.clone(), q, scale=0.5)
        k = round((1 - q) * 4000)
        assert ((z != 0).sum(1) == k).all()
        torch.testing.assert_close(
            z.double().abs().sum(1), torch.full((6,), 0.5, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0
        )
    assert torch.equal(F.signed_top_q_(torch.zeros(2, 50, dtype=dtype), 0.5), torch.zeros(2, 50, dtype=dtype))


def test_nan_counts_as_infinite_and_stays_in_its_datum():
    torch.manual_seed(0)
    x = torch.randn(4, 200)
    clean, signed = F.top_q(x, 0.9), F.signed_top_q(x, 0.9)
    x[2, 5] = math.nan
    for z, reference in (
        (F.top_q(x, 0.9), clean),
        (F.top_q_(x.clone(), 0.9), clean),
        (F.signed_top_q(x, 0.9), signed),
        (F.signed_top_q_(x.clone(), 0.9), signed),
    ):
        assert z[2, 5].isnan()
        assert (z[2] != 0).sum() == 20
        assert torch.equal(z[[0, 1, 3]], reference[[0, 1, 3]])
    x[2, :100] = math.inf
    assert (F.top_q_(x.clone(), 0.9)[2] != 0).sum() == 20
    assert not F.top_q_(x.clone(), 0.9)[2, 100:].isnan().any()


@pytest.mark.parametrize(
    ("q", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("0.5", TypeError), (True, TypeError)],
)
def test_a_wrong_q_is_named(q, error: type[Exception]):
    for function in (F.top_q, F.top_q_, F.signed_top_q, F.signed_top_q_):
        with pytest.raises(error, match="`q` must"):
            function(torch.zeros(3, 4), q)
    with pytest.raises(TypeError, match="real floating-point"):
        F.top_q(torch.zeros(3, dtype=torch.long), 0.5)


def test_gradient_passes_through_the_kept_entries():
    torch.manual_seed(0)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    F.top_q(x, 0.75).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (by_sorting(x.detach(), 0.75, -1) != 0).double())
    assert torch.autograd.gradcheck(lambda v: F.top_q(v, 0.75), (x,))


def test_vmap_and_compile_give_the_same():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 40).round(decimals=1)

    def select(v: torch.Tensor) -> torch.Tensor:
        return F.top_q(v, 0.75, param_ndim=1)

    assert torch.equal(torch.func.vmap(select)(x), select(x))
    assert torch.equal(torch.compile(select, backend="eager", fullgraph=True)(x), select(x))
    signed = F.signed_top_q(x, 0.75, param_ndim=1)
    assert torch.equal(torch.func.vmap(lambda v: F.signed_top_q(v, 0.75, param_ndim=1))(x), signed)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.of_size: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        passes = not any(name in str(func) for name in ("view", "detach", "new_empty"))
        if passes and first is not None and first.numel() >= 64 * 1024:
            self.of_size[str(func)] += 1
        return result


def test_selecting_from_normal_rows_takes_few_passes_and_few_calls():
    for length, passes, number in ((1024, 11, 105), (3072, 9, 100)):
        x = torch.randn(64, length, generator=torch.Generator().manual_seed(0))
        F.signed_top_q_(x.clone(), 0.9)  # tables are made
        with Calls() as calls:
            F.signed_top_q_(x, 0.9)
        assert calls.of_size.total() <= passes
        assert calls.count <= number


def test_a_row_without_a_threshold_costs_the_others_no_pass():
    x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    with Calls() as usual:
        F.top_q_(x.clone(), 0.9)
    x[5] = 1.0
    with Calls() as calls:
        F.top_q_(x.clone(), 0.9)
    more = calls.of_size - usual.of_size
    assert all("index" in name for name in more), more  # those take some rows only


def test_in_place_selection_of_a_large_tensor_needs_no_memory_of_its_size():
    x = torch.randn(64, 3, 224, 224)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            made = (
                isinstance(result, torch.Tensor)
                and result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            )
            largest = max(largest, result.untyped_storage().nbytes() if made else 0)
            return result

    with Largest():
        F.top_q_(x, 0.9)
    assert largest <= x.nbytes // 3


def test_tensors_selected_from_together_are_as_one_by_one():
    torch.manual_seed(0)
    shapes = [(64, 3, 7, 7), (64,), (8, 147), (3, 0), (5, 6, 7), (2000, 200), (0, 4), ()]
    xs = [torch.randn(shape).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    xs.append(torch.randn(147, 9).t())
    ks = [max(0, x.ndim - 1) for x in xs]
    for q in (0.9, 0.3):
        for together_, alone in (
            (_selection.top_q_of_all_, F.top_q),
            (_selection.signed_top_q_of_all_, F.signed_top_q),
        ):
            changed = [x.clone(memory_format=torch.preserve_format) for x in xs]
            together_(changed, ks, q)
            for x, k, y in zip(xs, ks, changed, strict=True):
                torch.testing.assert_close(y, alone(x, q, param_ndim=k), rtol=torch.finfo(x.dtype).eps, atol=0)


@pytest.mark.parametrize("count", [1, 4, 9, 60])
def test_a_nan_is_kept_by_every_form(count: int) -> None:
    x = torch.randn(500, 100, generator=torch.Generator().manual_seed(count))
    x[torch.arange(500), torch.arange(500) % 100] = torch.nan
    for change_ in (F.top_q_, F.signed_top_q_):
        z = change_(x.clone(), 1 - count / 100)
        assert torch.equal(z.isnan(), x.isnan())


@pytest.mark.parametrize("length", [17, 147, 512, 3072, 9000])
@pytest.mark.parametrize("power", [0.3, 1.0, 3.0, 9.0])
def test_the_largest_are_kept_whatever_the_distribution(length: int, power: float):
    torch.manual_seed(0)
    x = torch.randn(40, length)
    x = x.abs().pow(power).copysign(x) * torch.rand(40, 1).pow(5)
    x[3, : length // 2] = 0.0  # ties
    x[5, ::9] = math.inf
    x[7] = 0.0
    for q in (0.05, 0.5, 0.9, 1 - 1.4 / length):
        count = round((1 - q) * length)
        order = torch.sort(x.abs(), dim=1, descending=True, stable=True).indices[:, :count]
        expected = torch.zeros_like(x).scatter(1, order, x.gather(1, order))
        assert torch.equal(F.top_q_(x.clone(), q), expected)
        assert torch.equal(F.top_q(x, q), expected)
        signed = F.signed_top_q_(x.clone(), q)
        torch.testing.assert_close(signed.double().abs().sum(1), (expected != 0).any(1).double())
        assert torch.equal(signed.sign(), expected.sign())
