"""Gradients of the projections where pieces of a formula meet: on faces, edges, the sphere, and at zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rai_toolbox import functional as F

BALLS = {1: F.project_l1_ball, 2: F.project_l2_ball, torch.inf: F.project_linf_ball}
# Zero, equal to a bound or to the radius, inside and outside.
VALUES = (-3.0, -1.0, -0.5, -0.3, 0.0, 0.1, 0.3, 0.5, 1.0, 3.0)
BOXES = [
    (None, None), (-1.0, 1.0), (0.0, None), (None, 0.0), (0.0, 1.0), (-0.3, 0.3), (-0.2, 1.0), (None, 0.1),
    (0.05, 1.0), (-5.0, -0.1),
]  # fmt: skip
Function = Callable[..., Tensor]


def points(length: int) -> Tensor:
    """All of one or two such entries, some of three."""
    every = torch.tensor(list(itertools.product(VALUES, repeat=length)), dtype=torch.float64)
    return every if length < 3 else every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:100]]


def jacobian(function: Function, arguments: dict[str, Tensor], name: str) -> Tensor:
    """d out[n, i] / d argument[n, j], where row n depends on row n alone."""
    v = arguments[name].clone().requires_grad_()
    out = function(**arguments | {name: v})
    rows = [torch.autograd.grad(out[:, i].sum(), v, retain_graph=True)[0] for i in range(out.shape[1])]
    return torch.stack(rows, 1).reshape(len(out), out.shape[1], -1)


def one_sided(function: Function, arguments: dict[str, Tensor], name: str, step: float) -> Tensor:
    v = arguments[name]
    before = function(**arguments)
    columns = []
    for j in range(v[0].numel()):
        moved = v.clone()
        moved.view(len(v), -1)[:, j] += step
        columns.append((function(**arguments | {name: moved}) - before) / step)
    return torch.stack(columns, -1)


def check(function: Function, arguments: dict[str, Tensor]) -> None:
    """A Jacobian is finite; where both sides agree it is theirs; elsewhere it lies between those of points nearby."""
    generator = torch.Generator().manual_seed(0)
    for name in arguments:
        ours = jacobian(function, arguments, name)
        assert bool(ours.isfinite().all()), name
        sides = torch.stack([one_sided(function, arguments, name, step) for step in (-1e-7, 1e-7)])
        least, most = sides.amin(0), sides.amax(0)
        smooth = (most - least).flatten(1).amax(1) < 1e-5
        assert torch.allclose(ours[smooth], most[smooth], atol=1e-5), (name, first_bad(ours, most, smooth, arguments))
        kinked = {k: v[~smooth] for k, v in arguments.items()}
        least, most, ours = least[~smooth], most[~smooth], ours[~smooth]
        for _ in range(64 if len(ours) else 0):
            near = {k: v + 1e-5 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in kinked.items()}
            nearby = one_sided(function, near, name, 1e-8)
            least, most = torch.minimum(least, nearby), torch.maximum(most, nearby)
        between = ((ours > least - 1e-2) & (ours < most + 1e-2)).flatten(1).all(1)
        assert bool(between.all()), (name, first_bad(ours, most, ~between, kinked))


def first_bad(ours: Tensor, true: Tensor, rows: Tensor, arguments: dict[str, Tensor]) -> object:
    bad = (rows & ((ours - true).abs() > 1e-5).flatten(1).any(1)).nonzero()[0, 0]
    return {k: v[bad].tolist() for k, v in arguments.items()}, ours[bad].tolist(), true[bad].tolist()


def case(length: int, box: tuple[float | None, float | None], epsilon: float) -> dict[str, Tensor]:
    x = points(length)
    arguments = {"x": x, "epsilon": torch.full((len(x),), epsilon, dtype=x.dtype)}
    return arguments | {n: torch.full_like(x, b) for n, b in zip(("lower", "upper"), box, strict=True) if b is not None}


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_gradients_by_every_argument_where_pieces_meet(p: float, box: tuple):
    for length in (1, 2, 3):
        check(BALLS[p], case(length, box, 0.5))


@pytest.mark.parametrize("p", BALLS)
@pytest.mark.parametrize(("box", "epsilon"), [(box, e) for box in BOXES for e in (0.0, 1e-200, 1e200, torch.inf)]
                         + [((0.0, 0.0), 0.5), ((0.1, 0.1), 0.5)], ids=str)  # fmt: skip
def test_gradients_are_finite_at_the_end_of_what_is_allowed(p: float, box: tuple, epsilon: float):
    if epsilon < 1e-100 and not (box[0] or 0.0) <= 0.0 <= (0.0 if box[1] is None else box[1]):
        return  # ball and box have no point in common
    for length in (1, 2):
        arguments = case(length, box, epsilon)
        for name in arguments:
            assert bool(jacobian(BALLS[p], arguments, name).isfinite().all()), name


def test_a_radius_that_grows_from_zero_takes_the_entries_along():
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    for p, expected in ((1, [0.0, -1.0]), (2, [0.6, -0.8])):
        for box in ({}, {"lower": -1.0, "upper": 1.0}):
            z = BALLS[p](x, zero, **box)
            grads = [torch.autograd.grad(z[0, i], zero, retain_graph=True)[0].item() for i in range(2)]
            assert grads == pytest.approx(expected), (p, box)


@pytest.mark.parametrize("p", BALLS)
def test_one_datum_without_a_batch_has_the_same_gradients(p: float):
    x = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    epsilon = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    lower, upper = (torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (-1.0, 0.4))
    assert torch.autograd.gradcheck(
        lambda x, e, l, u: BALLS[p](x, e, param_ndim=None, lower=l, upper=u), (x, epsilon, lower, upper)
    )


@pytest.mark.parametrize("total", [0.5, 1.0])
def test_gradients_of_the_simplex_where_pieces_meet(total: float):
    for length in (1, 2, 3):
        x = points(length)
        check(F.project_simplex, {"x": x, "total": torch.full((len(x),), total, dtype=x.dtype)})


def test_gradients_of_the_box_where_pieces_meet():
    x = points(2)
    for low, high in ((-1.0, 1.0), (0.0, 0.3), (-0.5, 0.5)):
        check(F.project_box, {"x": x, "lower": torch.full_like(x, low), "upper": torch.full_like(x, high)})


@pytest.mark.parametrize("k", [0, 1, 2])
def test_gradients_of_the_l0_ball_pass_through_the_kept_entries(k: int):
    x = torch.tensor([[3.0, 0.25, -2.0], [0.1, 0.9, -0.7]], dtype=torch.float64, requires_grad=True)
    lower, upper = (torch.tensor(b, dtype=torch.float64, requires_grad=True) for b in (-1.0, 0.8))
    assert torch.autograd.gradcheck(lambda x, l, u: F.project_l0_ball(x, k, lower=l, upper=u), (x, lower, upper))


def test_infinite_entries_give_the_gradient_of_large_ones():
    for p in (1, 2):
        epsilon = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        for x in ([[torch.inf, 1.0]], [[torch.inf, -torch.inf, 0.0]], [[1e308, 1.0]], [[1e308, -1e308]]):
            z = BALLS[p](torch.tensor(x, dtype=torch.float64), epsilon, lower=-1.0, upper=1.0)
            assert torch.autograd.grad(z.abs().sum(), epsilon)[0].item() == pytest.approx((len(x[0]) - x[0].count(1.0)
                - x[0].count(0.0)) ** (1 - 1 / p)), (p, x)  # fmt: skip
