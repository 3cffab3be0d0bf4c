"""Projections: nearest, in the set, at rest when repeated, over the whole range of every dtype."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from scipy.optimize import minimize
from tests.functional import exact_projections
from tests.functional.tensor_layouts import DTYPES, SHAPES, as_rows, layouts, param_ndims
from torch.utils._python_dispatch import TorchDispatchMode

import rai_toolbox.functional as F

BALLS = {1: F.project_l1_ball, 2: F.project_l2_ball, math.inf: F.project_linf_ball}
IN_PLACE = {1: F.project_l1_ball_, 2: F.project_l2_ball_, math.inf: F.project_linf_ball_}
INF = math.inf


def norm(z: torch.Tensor, p: float) -> torch.Tensor:
    wide = z.double()
    if p == 1:  # torch.linalg.vector_norm of order 1 is 30 ulp off for 1,024 entries
        return wide.abs().sum(-1)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(1e-320)
    return torch.linalg.vector_norm(wide / largest, p, -1) * largest[..., 0]


def allowed(epsilon: float, dtype: torch.dtype, d: int, p: float) -> float:
    """The radius, and rounding: half an ulp for each entry, and what a norm may be above to count as inside."""
    info = torch.finfo(dtype)
    return epsilon * (1 + 8 * info.eps) + d ** (1 / p) * info.smallest_normal * info.eps


def ulps(z: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor | float) -> float:
    """The largest error in ulp of the larger of the entry and `scale`."""
    info = torch.finfo(z.dtype)
    size = torch.maximum(exact.abs(), torch.as_tensor(scale, dtype=torch.float64))
    ulp = (size * info.eps).clamp_min(info.smallest_normal * info.eps)
    return float(((z.double() - exact).abs() / ulp).max())


@st.composite
def matrices(draw: st.DrawFn, dtype: torch.dtype, decades: float | None = None) -> torch.Tensor:
    """A few short rows whose entries lie within some decades, anywhere in the range of the dtype."""
    info = torch.finfo(dtype)
    span = math.log10(info.max) - math.log10(info.smallest_normal * info.eps)
    width = draw(st.sampled_from([1.0, 4.0, span])) if decades is None else decades
    top = draw(st.floats(math.log10(info.max) - span + width, math.log10(info.max)))
    exponents = st.floats(top - width, top)
    entry = st.one_of(
        st.just(0.0),
        st.builds(lambda e, s: s * min(10.0 ** min(e, 308.2), info.max), exponents, st.sampled_from([1.0, -1.0])),
    )
    d = draw(st.integers(1, 5))
    data = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=1, max_size=3))
    return torch.tensor(data, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", BALLS)
def test_projection_on_a_ball_is_the_nearest_point_over_the_whole_range(p: float, dtype: torch.dtype):
    @settings(max_examples=60, deadline=None)
    @given(x=matrices(dtype), share=st.sampled_from([0.0, 1e-6, 0.3, 0.999, 1.0, 3.0]))
    @example(x=torch.full((1, 4), torch.finfo(dtype).max, dtype=dtype), share=1e-3)
    @example(x=torch.full((1, 4), torch.finfo(dtype).smallest_normal, dtype=dtype), share=0.5)
    def check(x: torch.Tensor, share: float):
        epsilon = min(share * min(float(norm(x, p).max()), torch.finfo(dtype).max), torch.finfo(dtype).max)
        z = BALLS[p](x, epsilon)
        exact = exact_projections.rows(x, epsilon, p, -INF, INF)
        assert (norm(z, p) <= allowed(epsilon, dtype, x.shape[1], p)).all()
        assert ulps(z, exact, min(epsilon, float(x.double().abs().max()))) <= 6
        assert torch.equal(BALLS[p](z, epsilon), z)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", BALLS)
def test_projection_on_ball_and_box_is_the_nearest_point_over_the_whole_range(p: float, dtype: torch.dtype):
    @settings(max_examples=60, deadline=None)
    @given(x=matrices(dtype), box=matrices(dtype), share=st.sampled_from([1e-3, 0.3, 0.999, 2.0]), data=st.data())
    def check(x: torch.Tensor, box: torch.Tensor, share: float, data: st.DataObject):
        d = min(x.shape[1], box.shape[1])
        x, bound = x[:, :d], box[:1, :d].abs()
        lower, upper = data.draw(st.sampled_from([(-bound, bound), (-bound, None), (0.0, bound), (bound / 2, bound)]))
        least = 0.0 if not isinstance(lower, torch.Tensor) else float(norm(lower.clamp_min(0), p).max())
        epsilon = least + share * min(float(torch.maximum(norm(x, p).max(), norm(bound, p).max())), 1e308)
        epsilon = min(epsilon, torch.finfo(dtype).max)
        if not epsilon >= least:
            return
        z = BALLS[p](x, epsilon, lower=lower, upper=upper)
        exact = exact_projections.rows(x, epsilon, p, lower, INF if upper is None else upper)
        assert (z >= lower).all()
        assert upper is None or (z <= upper).all()
        assert (norm(z, p) <= allowed(epsilon, dtype, d, p)).all()
        assert ulps(z, exact, min(epsilon, float(exact.abs().max()))) <= 12
        assert torch.equal(BALLS[p](z, epsilon, lower=lower, upper=upper), z)

    check()


@pytest.mark.parametrize("p", BALLS)
def test_projection_on_ball_and_box_agrees_with_a_general_convex_solver(p: float):
    torch.manual_seed(3)
    epsilon = 0.8
    for _ in range(6):
        x = torch.randn(6, dtype=torch.float64) * 2
        lower, upper = -torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
        z = BALLS[p](x, epsilon, param_ndim=None, lower=lower, upper=upper)
        # z = u - v with u, v ≥ 0 makes every norm smooth
        target = x.numpy()

        def distance(w: np.ndarray, target: np.ndarray = target) -> float:
            return float(((w[:6] - w[6:] - target) ** 2).sum())

        limit = {
            1: lambda w: epsilon - w.sum(),
            2: lambda w: epsilon**2 - ((w[:6] - w[6:]) ** 2).sum(),
            math.inf: lambda w: epsilon - w,
        }[p]
        bounds = [(0, float(u)) for u in upper] + [(0, -float(l)) for l in lower]
        found = minimize(
            distance, np.zeros(12), bounds=bounds, constraints={"type": "ineq", "fun": limit}, options={"ftol": 1e-14}
        )
        assert float((z - x).square().sum()) <= found.fun + 1e-9
        np.testing.assert_allclose(z.numpy(), found.x[:6] - found.x[6:], atol=2e-4)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("box", [False, True])
def test_long_rows_satisfy_the_optimality_conditions(p: int, dtype: torch.dtype, box: bool):
    torch.manual_seed(0)
    x = torch.randn(16, 3072, dtype=dtype) * torch.logspace(-2, 2, 16, dtype=dtype).unsqueeze(1)
    lower, upper = (-torch.rand(16, 3072, dtype=dtype), torch.rand(16, 3072, dtype=dtype)) if box else (None, None)
    low, high = (lower.double(), upper.double()) if box else (torch.tensor(-INF), torch.tensor(INF))  # pyright: ignore
    for epsilon in (1e-3, 1.0, 20.0):
        z = BALLS[p](x, epsilon, lower=lower, upper=upper)
        n = norm(z, p)
        assert (n <= allowed(epsilon, dtype, 3072, p)).all()
        outside = norm(x.double().clamp(low, high), p) > epsilon
        assert ((n - epsilon).abs() / epsilon)[outside].max() <= 10 * torch.finfo(dtype).eps
        # an entry strictly inside its bounds has the row's one multiplier
        a, b = x.double().abs(), z.double().abs()
        free = (b > 0.01 * b.amax(1, keepdim=True)) & (z.double() > low) & (z.double() < high)
        multiplier = a - b if p == 1 else b / a
        high_m = torch.where(free, multiplier, -INF).amax(1)
        low_m = torch.where(free, multiplier, INF).amin(1)
        some = free.any(1) & outside
        scale = a.amax(1) if p == 1 else high_m
        assert ((high_m - low_m) / scale)[some].max() <= 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_and_out_of_place_agree_for_any_strides_and_param_ndim(p: float, shape: tuple[int, ...]):
    torch.manual_seed(0)
    x = torch.randn(shape) * 2
    for param_ndim in param_ndims(len(shape)):
        z = BALLS[p](x, 0.7, param_ndim=param_ndim)
        rows = as_rows(z, param_ndim)
        assert z.shape == x.shape
        if x.numel():
            assert (norm(rows, p) <= allowed(0.7, x.dtype, rows.shape[1], p)).all()
        for name, y in layouts(x).items():
            for kw in ({}, {"lower": -0.2, "upper": torch.full(shape[-1:], 0.4)}):
                expected = BALLS[p](x, 0.7, param_ndim=param_ndim, **kw)
                changed = layouts(x)[name] if name == "contiguous" else y.clone(memory_format=torch.preserve_format)
                assert IN_PLACE[p](changed, 0.7, param_ndim=param_ndim, **kw) is changed
                torch.testing.assert_close(changed, expected, msg=f"{name} {param_ndim} {kw}")


def test_a_projection_in_place_leaves_the_memory_between_the_entries_alone():
    wide = torch.full((4, 9), 5.0)
    F.project_l1_ball_(wide[:, 1:8:2], 1.0)
    assert (wide[:, ::2] == 5).all()
    assert (norm(wide[:, 1:8:2], 1) <= 1 + 1e-6).all()


def test_an_expanded_tensor_is_projected_out_of_place():
    x = torch.randn(1, 6).expand(3, 6)
    for p, project in BALLS.items():
        torch.testing.assert_close(project(x, 0.5), project(x.clone(), 0.5))
        assert project(x, 0.5, lower=-1.0).shape == (3, 6), p


@pytest.mark.parametrize("p", BALLS)
def test_a_radius_may_be_given_per_datum(p: float):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    radii = torch.tensor([[0.0, 0.5, 1.0], [100.0, 2.0, 0.1]])
    alone = torch.stack(
        [torch.stack([BALLS[p](x[i, j], float(radii[i, j]), param_ndim=1) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(BALLS[p](x, radii, param_ndim=1), alone)
    torch.testing.assert_close(BALLS[p](x, radii.flatten(), param_ndim=1), alone)
    torch.testing.assert_close(IN_PLACE[p](x.clone(), radii, param_ndim=1), alone)
    across = BALLS[p](x, radii[:, :1], param_ndim=1)
    torch.testing.assert_close(across[:, 0], alone[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", BALLS)
def test_a_zero_radius_gives_zero_and_an_infinite_one_changes_nothing(p: float, dtype: torch.dtype):
    x = torch.randn(3, 5).to(dtype)
    assert (BALLS[p](x, 0.0) == 0).all()
    assert (BALLS[p](x, 0.0, lower=-1.0, upper=1.0) == 0).all()
    assert torch.equal(BALLS[p](x, INF), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_entries_share_the_radius_as_if_they_had_grown_together(dtype: torch.dtype):
    x = torch.tensor([[INF, 3.0, -INF], [INF, INF, INF], [1.0, 5.0, -INF]], dtype=dtype)
    one = BALLS[1](x, 1.0).double()
    two = BALLS[2](x, 1.0).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(one[0], torch.tensor([0.5, 0, -0.5], dtype=torch.float64), rtol=eps, atol=0)
    torch.testing.assert_close(one[1], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=eps, atol=0)
    torch.testing.assert_close(two[0], torch.tensor([0.5**0.5, 0, -(0.5**0.5)], dtype=torch.float64), rtol=eps, atol=0)
    torch.testing.assert_close(two[2], torch.tensor([0, 0, -1.0], dtype=torch.float64), rtol=eps, atol=0)
    assert torch.equal(BALLS[INF](x, 1.0), torch.tensor([[1, 1, -1], [1, 1, 1], [1, 1, -1]], dtype=dtype))
    # in a box an infinite entry takes its bound, and the others the rest of the radius
    for p in (1, 2):
        z = BALLS[p](x[:1], 1.0, lower=-0.25, upper=0.25).double()
        torch.testing.assert_close(z, torch.tensor([[0.25, 0.25, -0.25]], dtype=torch.float64))
        z = BALLS[p](x[1:2], 0.25, upper=torch.tensor([0.0625, 1.0, 1.0])).double()
        share = (0.25 - 0.0625) / 2 if p == 1 else ((0.25**2 - 0.0625**2) / 2) ** 0.5
        torch.testing.assert_close(z, torch.tensor([[0.0625, share, share]], dtype=torch.float64), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("kw", [{}, {"lower": -1.0, "upper": 1.0}])
def test_nan_never_leaves_its_datum(p: float, kw: dict[str, Any]):
    x = torch.randn(4, 50) * 3
    clean = BALLS[p](x, 0.5, **kw)
    x[1, 7] = math.nan
    for z in (BALLS[p](x, 0.5, **kw), IN_PLACE[p](x.clone(), 0.5, **kw)):
        assert z[1].isnan().any()
        assert torch.equal(z[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize(
    ("dtype", "value", "epsilon"),
    [
        (torch.float16, 6e4, 1.0),
        (torch.float16, 6e4, 1e-4),
        (torch.float16, 1.0, 1e-4),
        (torch.float32, 1e20, 1.0),
        (torch.float32, 3e38, 1.0),
        (torch.float32, 3e38, 1e30),
        (torch.float32, 1e-30, 1e-31),
        (torch.float64, 1e300, 1.0),
    ],
)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("box", [False, True])
def test_extreme_entries_land_on_the_ball(p: int, dtype: torch.dtype, value: float, epsilon: float, box: bool):
    x = torch.tensor([[value, -value, value / 2, 0.0]], dtype=torch.float64).to(dtype)
    kw: dict[str, Any] = {"lower": -epsilon, "upper": epsilon} if box else {}
    z = BALLS[p](x, epsilon, **kw)
    rounding = 3 * torch.finfo(dtype).eps + 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / epsilon
    assert abs(float(norm(z, p)) / epsilon - 1) <= rounding


def test_a_radius_at_the_end_of_float64_leaves_small_entries_and_bounds_as_they_are():
    x = torch.tensor([[1e304, 1e-310, 3.0], [-1e-310, 1e-320, 1.0]], dtype=torch.float64)
    for p in (1, 2):
        assert torch.equal(BALLS[p](x, 1e305), x)
        z = BALLS[p](x, 1e302, lower=-1e-289, upper=1e-289)
        assert torch.equal(z, x.clamp(-1e-289, 1e-289))
    torch.testing.assert_close(F.project_simplex(x[:1].abs(), 1.5e308)[0].sum().item(), 1.5e308)


@pytest.mark.parametrize("p", BALLS)
def test_a_ball_and_a_box_without_a_common_point_are_refused_by_name(p: float):
    x = torch.zeros(3, 4)
    lower = torch.zeros(3, 4)
    lower[2] = 1.0
    with pytest.raises(
        ValueError, match=r"no point in common for 1 of 3 data, the first of them number 2.*`epsilon` is 0.5"
    ):
        BALLS[p](x, 0.5, lower=lower)
    with pytest.raises(ValueError, match="`lower` must not exceed `upper`"):
        BALLS[p](x, 1.0, lower=1.0, upper=0.5)
    with pytest.raises(ValueError, match="`lower` must not exceed `upper`"):
        BALLS[p](x, 1.0, lower=lower, upper=torch.full((4,), 0.5))
    touching = BALLS[p](x, float(norm(lower[2], p)), lower=lower)
    assert torch.equal(touching, lower)


@pytest.mark.parametrize("p", BALLS)
def test_where_looking_is_not_free_a_ball_and_a_box_without_a_common_point_give_the_point_nearest_zero(p: float):
    x = torch.tensor([[3.0, -1.0, 0.5], [0.1, 0.2, -0.3]])
    lower = torch.tensor([[1.0, -2.0, 2.0], [-1.0, -1.0, -1.0]])

    def project(v: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return BALLS[p](v, 0.75, param_ndim=1, lower=low, upper=low + 3)

    with pytest.raises(ValueError, match="no point in common"):
        project(x, lower)
    z = torch.func.vmap(project)(x, lower)
    # on the cube entry by entry: the second lies in it
    assert z[0].tolist() == [1.0, -0.75 if p == math.inf else 0.0, 2.0]
    torch.testing.assert_close(z[1], project(x[1], lower[1]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"epsilon": -1.0}, ValueError, "`epsilon` must be at least 0, got -1.0"),
        ({"epsilon": math.nan}, ValueError, "`epsilon` must be at least 0"),
        ({"epsilon": "1"}, TypeError, "`epsilon` must be a number or a tensor"),
        ({"epsilon": torch.ones(2)}, ValueError, r"`epsilon` has shape \(2,\)"),
        ({"epsilon": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "at least 0 for every datum"),
        ({"epsilon": 1.0, "lower": torch.zeros(5)}, ValueError, r"`lower` has shape \(5,\)"),
        ({"epsilon": 1.0, "upper": "high"}, TypeError, "`upper` must be None, a number or a tensor"),
        ({"epsilon": 1.0, "upper": math.nan}, ValueError, "`upper` must not be NaN"),
        ({"epsilon": 1.0, "param_ndim": 3}, ValueError, "`param_ndim` is 3"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict, error: type[Exception], words: str):
    for project in BALLS.values():
        with pytest.raises(error, match=words):
            project(torch.zeros(3, 4), **arguments)
    with pytest.raises(TypeError, match="real floating-point tensor"):
        F.project_l1_ball(torch.zeros(3, dtype=torch.long), 1.0)


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("box", [False, True])
def test_gradients_agree_with_finite_differences(p: float, box: bool):
    torch.manual_seed(1)
    x = (torch.randn(3, 6, dtype=torch.float64) * 2).requires_grad_()
    epsilon = torch.tensor([0.7, 1.3, 50.0], dtype=torch.float64, requires_grad=True)
    if not box:
        assert torch.autograd.gradcheck(lambda x, e: BALLS[p](x, e), (x, epsilon))
        return
    lower = (-torch.rand(3, 6, dtype=torch.float64)).requires_grad_()
    upper = (torch.rand(6, dtype=torch.float64) * 0.6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e, l, u: BALLS[p](x, e, lower=l, upper=u), (x, epsilon, lower, upper))


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("box", [False, True])
def test_vmap_compile_and_grad_give_the_same_as_the_plain_call(p: float, box: bool):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 10) * torch.tensor([0.1, 1.0, 5.0, 1e20]).view(4, 1, 1)
    kw = {"lower": torch.full((10,), -0.3), "upper": 0.4} if box else {}

    def project(v: torch.Tensor) -> torch.Tensor:
        return BALLS[p](v, 1.0, param_ndim=1, **kw)

    plain = project(x)
    torch.testing.assert_close(torch.func.vmap(project)(x), plain, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(torch.compile(project, backend="eager", fullgraph=True)(x), plain, rtol=2e-6, atol=1e-7)
    total = torch.func.grad(lambda v: project(v).square().sum())(x[:3])
    y = x[:3].clone().requires_grad_()
    project(y).square().sum().backward()
    torch.testing.assert_close(total, y.grad, rtol=1e-4, atol=1e-5)


def test_the_path_that_never_looks_is_as_exact_over_the_range():
    torch.manual_seed(0)
    x = torch.randn(12, 5) * torch.logspace(-30, 30, 12).unsqueeze(1)
    lower, upper = -x.abs().amax(1, keepdim=True) * torch.rand(12, 5), x.abs().amax(1, keepdim=True) * torch.rand(12, 5)
    for p in (1, 2):
        for i in range(12):
            epsilon = 0.4 * float(x[i].abs().max())
            blind = torch.func.vmap(lambda v, l, u, p=p, e=epsilon: BALLS[p](v, e, param_ndim=1, lower=l, upper=u))
            z = blind(x[i : i + 1], lower[i : i + 1], upper[i : i + 1])
            exact = exact_projections.rows(x[i : i + 1], epsilon, p, lower[i : i + 1], upper[i : i + 1])
            assert ulps(z, exact, epsilon) <= 4, (p, i)


@settings(max_examples=60, deadline=None)
@given(x=matrices(torch.float64, decades=3.0))
def test_simplex_projection_is_nearest(x: torch.Tensor):
    x = x / 16  # what is added to it below must not overflow
    total = float(x.abs().max()) or 1.0
    z = F.project_simplex(x, total)
    # z = max(x - θ, 0) with one θ a row
    exact = exact_projections.rows(x - x.amin(1, keepdim=True) + total, total, 1, 0.0, INF)
    assert ulps(z, exact, total) <= 12
    assert torch.equal(F.project_simplex(z, total), z)
    assert torch.equal(F.project_simplex_(x.clone(), total), z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_simplex_projection_sums_to_the_total(dtype: torch.dtype):
    x = (torch.randn(3, 4, 5) * 3).to(dtype)
    totals = torch.tensor([0.5, 1.0, 7.0])
    z = F.project_simplex(x, totals)
    assert (z >= 0).all()
    torch.testing.assert_close(z.double().sum((1, 2)), totals.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(
        F.project_simplex(torch.full((4,), -INF).to(dtype).index_fill(0, torch.tensor([2]), INF), param_ndim=1),
        torch.tensor([0, 0, 1, 0], dtype=dtype),
    )


def test_large_entries_of_one_segment_are_all_found():
    torch.manual_seed(0)
    x = torch.randn(64, 1024) / 8
    x[:, ::128] += 3  # segments are strided: these are of one
    z = F.project_l1_ball(x, 1.0)
    exact = F.project_l1_ball(x.double(), 1.0)
    assert (exact > 0).sum(1).max() > 1
    assert (z - exact).abs().max() <= 4 * torch.finfo(x.dtype).eps
    assert torch.equal(F.project_l1_ball_(x, 1.0), z)


@pytest.mark.parametrize(("epsilon", "most"), [(1.0, 20), (100.0, 39)])
def test_projecting_normal_rows_on_an_l1_ball_takes_few_passes(epsilon: float, most: int):
    torch.manual_seed(0)
    x = torch.randn(64, 1024)
    passes = 0

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal passes
            first = next((a for a in args if isinstance(a, torch.Tensor)), None)
            other = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else first
            large = max(a.numel() for a in (first, other) if a is not None) if first is not None else 0
            passes += large >= x.numel() and "view" not in str(func)
            return func(*args, **(kwargs or {}))

    with Passes():
        F.project_l1_ball_(x, epsilon)
    assert passes <= most


def test_simplex_gradient_agrees_with_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    total = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(F.project_simplex, (x, total))


@settings(max_examples=80, deadline=None)
@given(x=matrices(torch.float32, decades=2.0), k=st.integers(0, 5), boxed=st.booleans())
def test_l0_projection_is_no_farther_than_any_choice_of_entries(x: torch.Tensor, k: int, boxed: bool):
    bound = x.abs().amax().clamp_min(1e-30) / 2
    lower, upper = (-bound, bound / 2) if boxed else (None, None)
    z = F.project_l0_ball(x, k, lower=lower, upper=upper)
    assert ((z != 0).sum(1) <= k).all()
    clipped = (x if lower is None else x.clamp(lower, upper)).double()
    wide = x.double()
    d = x.shape[1]
    best = torch.stack(
        [
            (torch.where(torch.tensor([i in keep for i in range(d)]), clipped, 0.0) - wide).square().sum(1)
            for keep in itertools.combinations(range(d), min(k, d))
        ]
    ).amin(0)
    assert ((z.double() - wide).square().sum(1) <= best * (1 + 1e-6)).all()
    assert torch.equal(F.project_l0_ball_(x.clone(), k, lower=lower, upper=upper), z)


def test_l0_projection_keeps_an_entry_that_the_box_does_not_let_be_zero():
    x = torch.tensor([[9.0, 0.1, 5.0]])
    z = F.project_l0_ball(x, 2, lower=torch.tensor([-10.0, 1.0, -10.0]))
    assert torch.equal(z, torch.tensor([[9.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="leave zero out in 3 entries of datum 0"):
        F.project_l0_ball(x, 2, lower=1.0)
    with pytest.raises(TypeError, match="`k` must be an int"):
        F.project_l0_ball(x, 1.5)  # pyright: ignore[reportArgumentType]


def test_l0_projection_of_the_largest_entries_keeps_the_largest():
    x = torch.tensor([[3e38, -2e38, 1.0], [1e-45, 3e-45, 0.0]])
    assert torch.equal(F.project_l0_ball(x, 1) != 0, torch.tensor([[True, False, False], [False, True, False]]))


def test_box_takes_numbers_and_tensors():
    x = torch.tensor([[-3.0, 0.5, math.nan], [3.0, -0.5, INF]])
    z = F.project_box(x, torch.tensor([-1.0, 0.6, 0.0]), 2)
    torch.testing.assert_close(z, torch.tensor([[-1.0, 0.6, math.nan], [2.0, 0.6, 2.0]]), equal_nan=True)
    torch.testing.assert_close(F.project_box_(x.t().clone().t(), torch.tensor([-1.0, 0.6, 0.0]), 2), z, equal_nan=True)
    assert torch.equal(F.project_box(x[1], None, None), x[1])
    with pytest.raises(ValueError, match="must not exceed"):
        F.project_box(x, 1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_datum_with_nan_has_no_nearest_point_in_the_simplex_and_keeps_its_nan(dtype: torch.dtype):
    x = torch.tensor([[0.2, torch.nan, 0.7, 0.1, -3.0], [0.0, 2.0, 0.0, 0.0, -1.0]], dtype=dtype)
    z = F.project_simplex(x)
    assert z[0].isnan().any()
    assert torch.equal(z[1], torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=dtype))


def test_l1_with_a_box_is_at_rest_in_float64_where_roundings_of_many_entries_add_up():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    for length in (3, 12, 31, 39) * 3:
        x = torch.randn(1000, length, generator=generator, dtype=torch.float64) * 10 ** (6 * random(1000, 1) - 3)
        upper = 3 * random(1000, length)
        lower = torch.minimum(-3 * random(1000, length) + 0.5, upper)
        needed = torch.minimum(torch.maximum(torch.zeros_like(x), lower), upper).abs().sum(1)
        epsilon = needed * (1 + 1e-9) + 10 ** (4 * random(1000) - 3)
        z = F.project_l1_ball(x, epsilon, lower=lower, upper=upper)
        assert torch.equal(F.project_l1_ball(z, epsilon, lower=lower, upper=upper), z)
        assert bool((z.abs().sum(1) <= epsilon * (1 + 4 * torch.finfo(z.dtype).eps)).all())
