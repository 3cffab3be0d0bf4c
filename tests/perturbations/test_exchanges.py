"""L0: entries of the nearest error are exchanged for fewer others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem, batches, check_shared_arguments
from rai_toolbox.perturbations._sparse_descent import exchange

ROWS = 20


def problem_of(model: Any, data: Tensor, **options: Any) -> Problem:
    given: dict[str, Any] = {"margin": lambda output, _: output[:, 0], "targeted": False} | options
    shared = check_shared_arguments(
        model, data, torch.zeros(len(data), dtype=torch.long), norm="l0", bounds=(0.0, 1.0), criterion=None,
        samples=1, batch_size=None, generator=None, **given,
    )  # fmt: skip
    return next(iter(batches(shared)))[1]


def exchanged(weights: list[float], bias: float, known: int, steps: int) -> tuple[Tensor, Tensor, list[int]]:
    """Distances after exchanges from where the first `known` entries are changed; evaluations; calls of the model."""
    linear = nn.Linear(len(weights) + 1, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([*weights, 0.0]))
        linear.bias.fill_(bias)
    linear.requires_grad_(False)
    forward: list[int] = []
    backward: list[int] = []
    linear.register_forward_hook(lambda *_: forward.append(1))
    linear.register_full_backward_hook(lambda *_: backward.append(1))
    data = torch.zeros(ROWS, len(weights) + 1)
    data[:, -1] = torch.linspace(0, 1, ROWS)  # random numbers belong to the data: no two alike
    problem = problem_of(linear, data)
    nearest, rows, spent = NearestFound(problem), torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    start = data.clone()
    start[:, :known] = 1
    nearest.update(rows, start, *problem.look(rows, start))
    assert (nearest.distance == known).all()
    forward.clear()
    exchange(problem, nearest, rows, lambda _: problem.objective.score, steps=steps, stream=0, spent=spent)
    return nearest.distance, spent, [len(forward), len(backward)]


def test_many_small_gains_are_exchanged_for_two_large_ones():
    distance, spent, calls = exchanged([1.0] * 6 + [2.9] * 2, -5.5, known=6, steps=50)
    assert (distance == 2).all()
    assert (spent == 50).all()
    assert calls == [50, 25]


def test_an_exchange_goes_on_where_the_loss_has_grown():
    # The second exchange puts in two entries, and it takes three: that of the first has to be there still.
    distance = exchanged([1.0] * 6 + [1.2] * 5, -5.5, known=6, steps=4)[0]
    assert (distance == 5).any()


@pytest.mark.parametrize("targeted", [False, True])
def test_a_look_scores_as_a_question_does(targeted):
    data = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    problem = problem_of(nn.Identity(), data, margin=None, targeted=targeted)
    rows = torch.arange(5)
    asked = problem.ask(rows, data, problem.objective.score, 0)
    score, achieved = problem.look(rows, data)
    assert torch.equal(score, asked.score)
    assert torch.equal(achieved, asked.achieved)
