"""Which runs `worst_case` makes, and how many passes they take."""

from __future__ import annotations

from itertools import chain, islice
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.functional import project_l1_ball, project_l2_ball
from rai_toolbox.kernels._points import scaled_into_ball, shrunk_into_ball
from rai_toolbox.perturbations import worst_case
from rai_toolbox.perturbations._promising import Promising


class Linear(nn.Module):
    """A linear classifier that counts the rows it is asked about."""

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, length, generator=torch.Generator().manual_seed(3)))
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x @ self.weight.T


def curved(x: Tensor) -> Tensor:
    """Forty classes, whose boundaries are bent."""
    first = torch.randn(24, 48, generator=torch.Generator().manual_seed(1)) / 5
    second = torch.randn(48, 40, generator=torch.Generator().manual_seed(2))
    return torch.sin(3 * x @ first) @ second


@pytest.mark.parametrize("length", [1, 2, 60])
@pytest.mark.parametrize("radius", [1e-3, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("bounded", [True, False])
def test_a_point_scaled_into_ball_and_box_is_the_nearest_one_whatever_the_batch(
    length: int, radius: float, bounded: bool
) -> None:
    some = torch.Generator().manual_seed(length)
    x = torch.rand(50, length, generator=some).round(decimals=1)
    delta = torch.randn(50, length, generator=some) * torch.logspace(-3, 3, 50)[:, None]
    low, high = (-x, 1 - x) if bounded else (None, None)
    found = scaled_into_ball(delta.clone(), torch.full((50, 1), radius), low, high)
    assert found is not None
    expected = project_l2_ball(delta, radius, param_ndim=1, lower=low, upper=high)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * radius)
    sides = [(None, None)] * 50 if low is None or high is None else list(zip(low[:, None], high[:, None], strict=True))
    alone = [scaled_into_ball(delta[i : i + 1], torch.full((1, 1), radius), *sides[i]) for i in range(50)]
    assert all(row is not None and torch.equal(row[0], found[i]) for i, row in enumerate(alone))


def test_a_point_out_of_the_range_of_squares_is_left_to_the_exact_projection() -> None:
    for delta, radius in ((1e25, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1.0, 1e30)):
        assert scaled_into_ball(torch.full((2, 3), delta), torch.full((2, 1), radius), None, None) is None


@pytest.mark.parametrize("length", [1, 2, 60])
@pytest.mark.parametrize("radius", [1e-3, 0.3, 2.0, 50.0])
def test_a_point_shrunk_into_ball_and_box_is_the_nearest_one_whatever_the_batch(length: int, radius: float) -> None:
    some = torch.Generator().manual_seed(length)
    x = torch.rand(50, length, generator=some).round(decimals=1)
    delta = radius * torch.randn(50, length, generator=some) * torch.logspace(-3, 2, 50)[:, None]
    radii, low, high = torch.full((50, 1), radius), -x, 1 - x
    found, rest = shrunk_into_ball(delta, radii, low, high)
    assert not set(rest.tolist()) & set((delta.abs().amax(1) < 32 * radius).nonzero()[:, 0].tolist())
    trusted = torch.ones(50, dtype=torch.bool).index_fill_(0, rest, False)
    expected = project_l1_ball(delta, radius, param_ndim=1, lower=low, upper=high)
    torch.testing.assert_close(found[trusted], expected[trusted], rtol=1e-6, atol=1e-5 * radius)
    assert (found.double().abs().sum(1)[trusted] <= radius * (1 + 1e-6)).all()
    alone = [shrunk_into_ball(delta[i : i + 1], radii[:1], low[i : i + 1], high[i : i + 1])[0] for i in range(50)]
    assert torch.equal(torch.cat(alone)[trusted], found[trusted])


def test_rows_beyond_single_precision_are_left_to_the_exact_projection_and_these_alone() -> None:
    delta = torch.tensor([[1e25, 1.0], [float("nan"), 1.0], [0.4, 0.3], [float("inf"), 0.0], [0.8, 0.8]])
    radii = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.0]])
    _, rest = shrunk_into_ball(delta, radii, torch.full((5, 2), -1.0), torch.full((5, 2), 1.0))
    assert rest.tolist() == [0, 1, 3, 4]


def test_rows_that_lie_inside_do_not_keep_a_batch_from_ending() -> None:
    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def calls(delta: Tensor) -> int:
        with Calls() as seen:
            shrunk_into_ball(delta, torch.ones(len(delta), 1), torch.full_like(delta, -1), torch.full_like(delta, 1))
        return seen.count

    outside = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    inside = outside / outside.abs().sum(1, keepdim=True) / 2
    assert calls(torch.cat([outside, inside])) == calls(outside)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_sample_far_from_every_error_is_given_up_after_a_third_of_the_passes(
    norm: Literal["linf", "l2", "l1"],
) -> None:
    model = Linear(10, 20)
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(4))
    y = model(x).argmax(1)
    top = model(x).topk(2).values.diff().abs().amin().item()
    model.rows = 0
    found = worst_case(model, x, y, norm=norm, epsilon=top / 1000, steps=50, restarts=18)
    assert not found.success.any()
    assert model.rows <= 6 * 300


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_many_classes_the_defaults_find_what_nine_runs_find(norm: Literal["linf", "l2"]) -> None:
    x = torch.rand(30, 24, generator=torch.Generator().manual_seed(5))
    y = curved(x).argmax(1)
    for epsilon in (0.02, 0.04):
        radius = epsilon * (1 if norm == "linf" else 4)
        nine, defaults = (
            worst_case(curved, x, y, norm=norm, epsilon=radius, bounds=(0, 1), steps=10, restarts=restarts).success
            for restarts in (9, 18)
        )
        assert nine.any()
        assert not (nine & ~defaults).any()
        assert not defaults.all()


def test_few_steps_are_not_spent_on_ranking_many_classes() -> None:
    model = Linear(50, 20)
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(4))
    y = model(x).argmax(1)
    model.rows = 0
    worst_case(model, x, y, norm="linf", epsilon=1e-5, steps=2, restarts=9)
    assert model.rows <= 6 * (2 * 9 + 2)


def promising(norm: str, distance: list[float]) -> Promising:
    """Of rows with a radius of 1, after seven runs, the last four from far outside, in which nothing came nearer."""
    nearest = SimpleNamespace(distance=torch.tensor(distance, dtype=torch.float64))
    radii = torch.ones(len(distance), dtype=torch.float64)
    made = Promising(norm, nearest, radii, 9, 17, tried=False, in_turn=False)  # pyright: ignore[reportArgumentType]
    rows = torch.arange(len(distance))
    for number in (0, 1, 2, 9, 10, 11, 12):
        made.of(rows, [number], torch.zeros_like(radii), rows < 0)
    return made


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_how_many_evaluations_are_left_says_what_is_given_up_not_the_number_of_the_run(norm: str) -> None:
    made, rows = promising(norm, [1.003, 1.5]), torch.arange(2)
    spent = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert made.of(rows, [17], spent, rows < 0).tolist() == [0]
    assert made.of(rows, [13], spent + 0.49, rows < 0).tolist() == []


def test_in_l1_two_runs_are_within_the_ball_where_walks_come_no_nearer_than_just_outside() -> None:
    made, rows = promising("l1", [1.02, 1.2, 1.02]), torch.arange(3)
    spent = torch.tensor([0.5, 0.5, 0.95], dtype=torch.float64)
    inside = {}
    for numbers in ([13, 14, 15], [16, 17], [18]):
        made.of(rows, numbers, spent, rows < 0)
        inside[numbers[0]] = made.within(rows, numbers, spent)
    assert (inside[13], inside[18]) == (None, None)
    assert inside[16] is not None
    assert inside[16][0].tolist() == [True, False, False]
    assert inside[16][1] == 2
    assert promising("l2", [1.02]).within(rows[:1], [13], spent[:1]) is None


def test_the_fourth_class_and_those_after_it_have_runs_of_their_own_but_in_l1() -> None:
    assert list(islice(chain.from_iterable(promising("l2", [1.0]).order()), 14)) == [
        0,
        1,
        2,
        9,
        10,
        11,
        12,
        3,
        4,
        5,
        6,
        7,
        8,
        13,
    ]
    assert list(islice(chain.from_iterable(promising("l1", [1.0]).order()), 9)) == [0, 1, 2, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_runs_side_by_side_take_the_places_of_data_that_left_and_no_more(digits: Any, norm: Any) -> None:
    model, x, y = digits
    sizes: list[int] = []

    def counted(points: Tensor) -> Tensor:
        sizes.append(len(points))
        return model(points)

    epsilon = {"linf": 0.1, "l2": 0.5, "l1": 1.3}[norm]
    alone = [
        worst_case(model, x[i : i + 1], y[i : i + 1], norm=norm, epsilon=epsilon, bounds=(0, 1)).success.item()
        for i in range(12)
    ]
    together = worst_case(counted, x[:12], y[:12], norm=norm, epsilon=epsilon, bounds=(0, 1))
    assert together.success.tolist() == alone  # a single datum has three rows in such a run, twelve have as many as fit
    assert max(sizes) <= 12
    assert 0 < sum(alone) < 12
