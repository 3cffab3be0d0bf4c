"""What a solver asks of a GPU for each question to the model: calls beside the model's own, and looks at a value."""

from __future__ import annotations

import pytest
import torch
from tests.kernels import solver_cost

from rai_toolbox.kernels import _points
from rai_toolbox.perturbations import minimum_norm, worst_case
from rai_toolbox.perturbations._ball import Norm

EPSILON: dict[Norm, float] = {"linf": 0.02, "l2": 0.3, "l1": 2.0, "l0": 3}
MOST_CALLS, MOST_LOOKS = 60, 0.2


@pytest.mark.parametrize("norm", EPSILON)
def test_the_nearest_error_is_searched_in_few_calls_and_looks(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = solver_cost.per_question(
        lambda model, x, y: minimum_norm(model, x, y, norm=norm, bounds=(0, 1), steps=30, restarts=12), monkeypatch
    )
    assert found.calls <= MOST_CALLS, found.counter.calls.most_common(12)
    assert found.looks <= MOST_LOOKS, found.counter.looks


@pytest.mark.parametrize("norm", EPSILON)
def test_the_worst_case_is_searched_in_few_calls_and_looks(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    found = solver_cost.per_question(
        lambda model, x, y: worst_case(
            model, x, y, norm=norm, epsilon=EPSILON[norm], bounds=(0, 1), steps=40, restarts=5
        ),
        monkeypatch,
    )
    assert found.calls <= MOST_CALLS, found.counter.calls.most_common(12)
    assert found.looks <= MOST_LOOKS, found.counter.looks


@pytest.mark.parametrize("norm", EPSILON)
def test_what_is_found_does_not_depend_on_how_often_is_looked(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = solver_cost.Asked()
    data = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    target = model(data).argmax(1)

    def errors() -> torch.Tensor:
        found = worst_case(model, data, target, norm=norm, epsilon=EPSILON[norm], bounds=(0, 1), steps=12, restarts=2)
        return found.success

    often = errors()
    monkeypatch.setattr(_points, "is_time_to_look", lambda step, x, every=1: step % 5 == 0)
    for module in ("_auto_pgd", "_descent", "_sparse_descent", "_random_search", "_nearest_found"):
        monkeypatch.setattr(f"rai_toolbox.perturbations.{module}.is_time_to_look", _points.is_time_to_look)
    assert torch.equal(errors(), often)
