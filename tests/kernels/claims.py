"""What holds of every form of the kernels, whichever works: a CPU's, Triton's, or the portable one.

Each claim takes a dtype. `test_forms.py` runs them on the first and the last, `in_the_interpreter.py` on Triton's.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Callable

import longdouble_oracles as ld
import torch
from optimizer_cases import MAGNITUDES, values
from tests.functional import exact_projections

import rai_toolbox.functional as F
from rai_toolbox import optim as ro
from rai_toolbox.kernels import _machine, _points

INF = math.inf
PROJECTIONS = {1: F.project_l1_ball_, 2: F.project_l2_ball_}
CLAIMS: list[Callable[[torch.dtype], None]] = []
SHAPES = [(3, 7), (2, 130), (), (0,), (5,), (4, 0), (2, 3, 4)]


def claim(function: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    CLAIMS.append(function)
    return function


def column_norm(z: torch.Tensor, p: float) -> torch.Tensor:
    wide = z.double()
    if p == 1:
        return wide.abs().sum(1)
    largest = wide.abs().amax(1, keepdim=True).clamp_min(1e-320)
    return (wide / largest).square().sum(1).sqrt() * largest[:, 0]


def ulps(z: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor | float) -> float:
    """The largest error in ulp of the larger of the entry and `scale`."""
    info = torch.finfo(z.dtype)
    size = torch.maximum(exact.abs(), torch.as_tensor(scale, dtype=torch.float64))
    return float(((z.double() - exact).abs() / (size * info.eps).clamp_min(info.smallest_normal * info.eps)).max())


@claim
def normalized_gradients_are_right_to_4_ulp_at_every_magnitude(dtype: torch.dtype) -> None:
    for p in (1, 2):
        for seed, magnitude in enumerate(MAGNITUDES):
            for shape in ((3, 7), (2, 130)):
                x = values(shape, dtype, magnitude, seed)
                z = F.normalize_(x.clone(), p)
                assert isinstance(z, torch.Tensor)
                exact = ld.normalized(ld.rows_of(x, 1), p)
                assert ld.error_in_ulp(z, exact, 1) <= 4, (p, magnitude, shape)


@claim
def a_list_of_tensors_is_as_each_by_itself_for_every_param_ndim(dtype: torch.dtype) -> None:
    xs = [values(shape, dtype, "normal", i) for i, shape in enumerate(SHAPES)]
    for param_ndim in (None, 0, -1, -2):
        fitting = [x for x in xs if x.ndim >= -(param_ndim or 0)]
        together = F.normalize_([x.clone() for x in fitting], 2, param_ndim=param_ndim)
        for x, z in zip(fitting, together, strict=True):
            k = F.datum_ndim(x.ndim, param_ndim)
            if x.numel():
                assert ld.error_in_ulp(z, ld.normalized(ld.rows_of(x, k), 2), k) <= 4
            else:
                assert z.shape == x.shape


@claim
def nan_and_infinity_stay_in_their_datum(dtype: torch.dtype) -> None:
    x = values((3, 40), dtype, "normal", 0)
    for change in (
        lambda v: F.normalize_(v, 2),
        lambda v: F.top_q_(v, 0.5),
        lambda v: F.signed_top_q_(v, 0.5),
        lambda v: F.project_l1_ball_(v, 0.5),
        lambda v: F.project_l2_ball_(v, 0.5),
        lambda v: F.project_l1_ball_(v, 0.5, lower=-0.25, upper=0.25),
        lambda v: F.project_l2_ball_(v, 0.5, lower=-0.25, upper=0.25),
        lambda v: F.project_simplex_(v, 0.5),
    ):
        clean = change(x.clone())
        for bad in (math.nan, INF):
            spoilt = x.clone()
            spoilt[1, 3] = bad
            z = change(spoilt)
            assert isinstance(z, torch.Tensor)
            assert isinstance(clean, torch.Tensor)
            torch.testing.assert_close(
                z[[0, 2]], clean[[0, 2]], rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
            )
            if math.isnan(bad):
                assert z[1].isnan().any()


@claim
def exactly_k_entries_are_kept_the_first_among_equals(dtype: torch.dtype) -> None:
    for seed, magnitude in enumerate(MAGNITUDES):
        for shape in ((3, 7), (2, 300)):
            x = values(shape, dtype, magnitude, seed)
            for q in (0.0, 0.3, 0.6, 0.9)[seed % 4 : seed % 4 + 1]:
                count = round((1 - q) * shape[1])
                expected = torch.from_numpy(ld.top_q(ld.rows_of(x, 1), q).astype("float64")).to(dtype)
                assert torch.equal(F.top_q_(x.clone(), q), expected), (magnitude, q, count)
                signs = F.signed_top_q_(x.clone(), q)
                assert ld.error_in_ulp(signs, ld.signed_top_q(ld.rows_of(x, 1), q), 1) <= 4


@claim
def the_oracle_of_the_l1_ball_is_a_vertex_with_the_sign_of_the_first_largest_entry(dtype: torch.dtype) -> None:
    radii = torch.tensor([0.5, 2.0, 0.0])
    for seed, magnitude in enumerate(MAGNITUDES):
        for shape in ((3, 7), (3, 300)):
            x = values(shape, dtype, magnitude, seed)
            x[1] = 0
            for epsilon in (0.5, radii):
                exact = torch.zeros(shape)
                where = x.float().abs().argmax(1)
                sign = torch.where(x[range(3), where] < 0, -1.0, 1.0)
                exact[range(3), where] = sign * torch.as_tensor(epsilon)
                assert torch.equal(F.lmo_l1_ball_(x.clone(), epsilon, negated=True).float(), exact), magnitude
                assert torch.equal(F.lmo_l1_ball_(x.clone(), epsilon).float(), 0.0 - exact), magnitude
    x = values((3, 7), dtype, "normal", 0)
    x[0, 3], x[0, 5] = INF, math.nan  # a NaN shows, wherever it is
    assert F.lmo_l1_ball_(x, 0.5).isnan().sum(1).tolist() == [1, 0, 0]


@claim
def projections_are_nearest_at_rest_and_in_the_set_over_the_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for p, project in PROJECTIONS.items():
        for seed, magnitude in enumerate(MAGNITUDES):
            x = values((3, 5), dtype, magnitude, seed)
            for share in (0.0, 1e-6, 0.3, 0.999, 3.0):
                epsilon = min(share * min(float(column_norm(x, p).max()), info.max), info.max)
                z = project(x.clone(), epsilon)
                exact = exact_projections.rows(x, epsilon, p, -INF, INF)
                room = 5 ** (1 / p) * info.smallest_normal * info.eps
                assert (column_norm(z, p) <= epsilon * (1 + 8 * info.eps) + room).all()
                assert ulps(z, exact, min(epsilon, float(x.double().abs().max()))) <= 6, (p, magnitude, share)
                assert torch.equal(project(z.clone(), epsilon), z)


@claim
def projections_on_ball_and_box_are_nearest_over_the_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for p, project in PROJECTIONS.items():
        for seed, magnitude in enumerate(MAGNITUDES):
            x, bound = values((2, 5), dtype, magnitude, seed), values((1, 5), dtype, "normal", 50 + seed).abs()
            if magnitude not in ("normal", "few", "ties"):
                bound = values((1, 5), dtype, magnitude, 50 + seed).abs()
            boxes = [(-bound, bound), (-bound, None), (0.0, bound), (bound / 2, bound)]
            for lower, upper in (boxes[0], boxes[1 + seed % 3]):
                least = float(column_norm(lower.clamp_min(0), p).max()) if isinstance(lower, torch.Tensor) else 0.0
                for share in (1e-3, 0.3):
                    most = min(float(torch.maximum(column_norm(x, p).max(), column_norm(bound, p).max())), info.max)
                    epsilon = min(least + share * most, info.max)
                    if not epsilon >= least:
                        continue
                    z = project(x.clone(), epsilon, lower=lower, upper=upper)
                    exact = exact_projections.rows(x, epsilon, p, lower, INF if upper is None else upper)
                    assert (z >= lower).all()
                    assert upper is None or (z <= upper).all()
                    scale = min(epsilon, float(exact.abs().max()))
                    assert ulps(z, exact, scale) <= 12, (p, magnitude, share, x, lower, upper, epsilon, z, exact)
                    assert torch.equal(project(z.clone(), epsilon, lower=lower, upper=upper), z)


@claim
def long_data_are_projected_as_short_ones(dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits == 16:  # their entries are too coarse for a norm of so many to be near the radius
        return
    x = values((2, 700), dtype, "normal", 5)
    low, high = -values((2, 700), dtype, "normal", 6).abs(), values((2, 700), dtype, "normal", 7).abs()
    for p, project in PROJECTIONS.items():
        for epsilon in (1e-3, 1.0, 20.0):
            for box in ({}, {"lower": low, "upper": high}):
                z = project(x.clone(), epsilon, **box)
                inner = x.double() if not box else torch.minimum(torch.maximum(x, low), high).double()
                outside = column_norm(inner, p) > epsilon
                assert ((column_norm(z, p) - epsilon).abs() / epsilon)[outside].le(10 * torch.finfo(dtype).eps).all()
                a, b = x.double().abs(), z.double().abs()
                free = b > 0.01 * b.amax(1, keepdim=True)
                if box:
                    free &= (z > low) & (z < high)
                unknown = a - b if p == 1 else b / a
                spread = torch.where(free, unknown, -INF).amax(1) - torch.where(free, unknown, INF).amin(1)
                size = a.amax(1) if p == 1 else unknown[free].amax()
                assert (spread / size)[outside & free.any(1)].le(40 * torch.finfo(dtype).eps).all()


@claim
def the_simplex_is_met(dtype: torch.dtype) -> None:
    for seed, magnitude in enumerate(("normal", "ties", "few", "wide", "huge")):
        x = values((3, 7), dtype, magnitude, seed)
        total = min(1.5, float(x.double().abs().max()) or 1.0)
        z = F.project_simplex_(x.clone(), total)
        exact = torch.from_numpy(ld.on_simplex(ld.rows_of(x, 1), total).astype("float64"))
        assert ulps(z, exact, total) <= 6, magnitude
        assert (z >= 0).all()
        assert torch.equal(F.project_simplex_(z.clone(), total), z)


@claim
def a_radius_may_be_given_for_each_datum(dtype: torch.dtype) -> None:
    x = values((3, 9), dtype, "normal", 3)
    radii = torch.tensor([0.0, 0.5, 100.0])
    for p, project in PROJECTIONS.items():
        for box in ({}, {"lower": -0.25, "upper": torch.full((9,), 0.5)}):
            z = project(x.clone(), radii, **box)
            for i in range(3):
                alone = project(x[i : i + 1].clone(), float(radii[i]), **box)
                assert ulps(z[i : i + 1], alone.double(), float(radii[i])) <= 2, (p, i)


@claim
def infinite_entries_share_the_radius_as_if_they_had_grown_together(dtype: torch.dtype) -> None:
    x = torch.tensor([[INF, 3.0, -INF], [INF, INF, INF], [1.0, 5.0, -INF]], dtype=dtype)
    eps = 2 * torch.finfo(dtype).eps
    one, two = F.project_l1_ball_(x.clone(), 1.0).double(), F.project_l2_ball_(x.clone(), 1.0).double()
    half = torch.tensor([0.5, 0, -0.5], dtype=torch.float64)
    torch.testing.assert_close(one[0], half, rtol=eps, atol=0)
    torch.testing.assert_close(one[1], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=eps, atol=0)
    torch.testing.assert_close(two[0], half.sign() * 0.5**0.5, rtol=eps, atol=0)
    torch.testing.assert_close(two[2], torch.tensor([0, 0, -1.0], dtype=torch.float64), rtol=eps, atol=0)
    for p, project in PROJECTIONS.items():
        z = project(x[:1].clone(), 1.0, lower=-0.25, upper=0.25).double()
        torch.testing.assert_close(z, torch.tensor([[0.25, 0.25, -0.25]], dtype=torch.float64))
        z = project(x[1:2].clone(), 0.25, upper=torch.tensor([0.0625, 1.0, 1.0])).double()
        share = (0.25 - 0.0625) / 2 if p == 1 else ((0.25**2 - 0.0625**2) / 2) ** 0.5
        torch.testing.assert_close(z, torch.tensor([[0.0625, share, share]], dtype=torch.float64), rtol=2 * eps, atol=0)


STEPS: dict[str, tuple[type, dict]] = {
    "L2Normed": (ro.L2NormedGradientOptim, {"grad_scale": 3.0, "grad_bias": 0.5}),
    "L2Normed whole": (ro.L2NormedGradientOptim, {"param_ndim": None}),
    "L2Projected": (ro.L2ProjectedOptim, {"epsilon": 0.75}),
    "LinfProjected": (ro.LinfProjectedOptim, {"epsilon": 0.75}),
    "L1qNormed": (ro.L1qNormedGradientOptim, {"q": 0.6}),
    "L1Ball": (ro.L1BallOptim, {"epsilon": 0.75}),
    "L2Ball and box": (ro.L2BallOptim, {"epsilon": 0.75, "lower": -0.5, "upper": 0.5}),
    "ClampedGradient": (ro.ClampedGradientOptimizer, {"clamp_min": -0.5}),
    "ClampedParameter": (ro.ClampedParameterOptimizer, {"clamp_max": 0.25}),
    "Simplex": (ro.SimplexOptim, {}),
    "L2FrankWolfe": (ro.L2FrankWolfe, {"epsilon": 0.75}),
    "L2FrankWolfe whole": (ro.L2FrankWolfe, {"epsilon": 0.75, "param_ndim": None}),
    "LinfFrankWolfe": (ro.LinfFrankWolfe, {"epsilon": 0.75}),
    "L1FrankWolfe": (ro.L1FrankWolfe, {"epsilon": 0.75, "use_default_lr_schedule": False}),
    "L1qFrankWolfe": (ro.L1qFrankWolfe, {"epsilon": 0.75, "q": 0.6, "use_default_lr_schedule": False}),
}


@claim
def a_step_of_many_tensors_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    def stepped(cls: type, options: dict) -> list[torch.Tensor]:
        params = [
            values(shape, dtype, "normal", i) for i, shape in enumerate([(3, 7), (2, 130), (5,), (0, 3), (1, 9000)])
        ]
        if "FrankWolfe" in cls.__name__ and "use_default_lr_schedule" not in options:
            params[0][1, 2] = INF  # the first step of the default schedule leaves nothing of the parameters
        for i, p in enumerate(params):
            p.requires_grad_().grad = values(tuple(p.shape), dtype, "normal", 20 + i)
        optim = cls(params, lr=0.25, **options)
        optim.step()
        if "FrankWolfe" in cls.__name__:
            for i, p in enumerate(params):
                p.grad = values(tuple(p.shape), dtype, "normal", 40 + i)
            optim.step()
        return [t.detach() for p in params for t in (p, p.grad) if t is not None]

    for name, (cls, options) in STEPS.items():
        ours = stepped(cls, options)
        with _machine.forced(None):
            theirs = stepped(cls, options)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, msg=name)


def around(dtype: torch.dtype, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = values((4, length), dtype, "normal", 1)
    return data, (values((4, length), torch.float32, "normal", 2) * 0.5)


@claim
def distances_of_points_are_those_of_float64(dtype: torch.dtype) -> None:
    for length in (1, 130, 300):
        data, delta = around(dtype, length)
        points = (data.float() + delta).to(dtype)
        points[0] = data[0]
        points[1, 0], data[1, 0] = INF, INF
        for norm, order in (("l1", 1), ("l2", 2), ("linf", INF), ("l0", 0)):
            expected = torch.where(points == data, 0.0, points.double() - data.double())
            found = _points.distances(points, data, norm)
            torch.testing.assert_close(found, torch.linalg.vector_norm(expected, order, 1), rtol=1e-12, atol=0)


@claim
def landed_points_lie_in_ball_and_box_as_stored_and_near_what_was_wished(dtype: torch.dtype) -> None:
    for length in (7, 130):
        data, delta = around(dtype, length)
        for norm in ("l1", "l2", "linf", "l0"):
            epsilon = torch.tensor([[0.0], [1e-3], [0.75], [1e4]], dtype=torch.float64)
            low, high = data.float().sub(0.25).to(dtype), torch.full((1, 1), 1.5, dtype=dtype).maximum(data)
            for lower, upper in ((None, None), (low, high), (data.amin().view(1, 1), data.amax().view(1, 1))):
                x = _points.land(delta, data, epsilon, lower, upper, norm)
                assert x.dtype == dtype
                if norm != "l0":
                    assert (_points.distances(x, data, norm) <= epsilon[:, 0]).all(), (norm, length)
                    assert torch.equal(x[0], data[0])
                if lower is not None and upper is not None:
                    assert ((x >= lower) & (x <= upper)).all()
                elif norm == "l0":
                    error = (x.double() - data.double() - delta.double()).abs()
                    assert (error <= torch.finfo(dtype).eps * (data.abs() + delta.abs()).double() + 1e-7).all()


@claim
def gradients_lose_nan_and_rows_of_zeros_become_the_same_directions_everywhere(dtype: torch.dtype) -> None:
    grad = values((4, 130), dtype, "normal", 3)
    grad[1] = 0
    grad[2, :3] = torch.tensor([math.nan, INF, -INF], dtype=dtype)
    grad[3] = math.nan
    keys, rows = torch.arange(9) * 0x3243F6A8885A308D, torch.tensor([8, 3, 1, 5])
    found, dead = _points.directions(grad, keys, rows, 77)
    assert dead.tolist() == [False, True, False, True]
    assert found.isfinite().all()
    assert torch.equal(found[0], grad[0].float())
    with _machine.forced(None):
        expected = _points.normals(keys, rows, 77, 130)
        assert torch.equal(found[1::2], expected[1::2].float())
        assert torch.equal(_points.directions(grad, keys, rows, 77)[0], found)
        uniform = _points.uniforms(keys, rows, 5, 130)
    assert torch.equal(_points.normals(keys, rows, 77, 130), expected)
    assert torch.equal(_points.uniforms(keys, rows, 5, 130), uniform)


@claim
def rows_are_put_where_a_mask_says(dtype: torch.dtype) -> None:
    into = values((6, 130), dtype, "normal", 4), torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.bool)
    before = [t.clone() for t in into]
    rows, mask = torch.tensor([5, 0, 2]), torch.tensor([True, False, True])
    given = values((3, 130), dtype, "normal", 5), torch.tensor([1.5, 2.5, 3.5]), torch.tensor([True, True, True])
    _points.put_rows_(into, rows, mask, given)
    for t, was, new in zip(into, before, given, strict=True):
        assert torch.equal(t[rows[mask]], new[mask].to(t.dtype))
        assert torch.equal(t[[0, 1, 3, 4]], was[[0, 1, 3, 4]])


@claim
def signs_of_the_largest_entries_share_one_in_each_row(dtype: torch.dtype) -> None:
    x = values((4, 130), dtype, "normal", 6)
    x[2, :129] = 0
    counts = torch.tensor([1, 26, 7, 130])
    z = _points.signs_of_largest(x, counts)
    for row, count, signs in zip(x, counts.tolist(), z, strict=True):
        which = row.float().abs().argsort(descending=True, stable=True)[:count]
        exact = torch.zeros(130).index_copy(0, which, row.float().sign()[which])
        exact = exact / exact.abs().sum()
        torch.testing.assert_close(signs.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
