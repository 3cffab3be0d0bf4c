"""What a solver asks of a GPU for each question to the model: calls beside the model's own, and looks at a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels import solver_cost

from rai_toolbox import optim as ro
from rai_toolbox.kernels import _points
from rai_toolbox.perturbations import gradient_ascent, minimum_norm, worst_case
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


ASCENTS: dict[str, tuple[int, dict[str, Any]]] = {  # calls for each step at most
    "Linf": (5, {"optimizer": ro.LinfProjectedOptim, "epsilon": 0.03, "lr": 0.01}),
    "L2": (5, {"optimizer": ro.L2ProjectedOptim, "epsilon": 0.5, "lr": 0.1}),
    "L1Ball": (6, {"optimizer": ro.L1BallOptim, "epsilon": 0.5, "lr": 0.1}),
    "L2, the best in bounds": (
        11,
        {"optimizer": ro.L2ProjectedOptim, "epsilon": 0.5, "lr": 0.1, "bounds": (0, 1), "use_best": True},
    ),
    "L2, stopping": (
        17,
        {"optimizer": ro.L2ProjectedOptim, "epsilon": 0.5, "lr": 0.1, "stop_when": lambda out, y: out.argmax(1) != y},
    ),
}


@pytest.mark.parametrize("name", ASCENTS)
def test_a_step_of_gradient_ascent_makes_few_calls_and_hardly_ever_looks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, options = ASCENTS[name]
    found = solver_cost.per_question(
        lambda model, x, y: gradient_ascent(model=model, data=x, target=y, steps=40, **options), monkeypatch
    )
    assert found.calls <= calls, found.counter.calls
    # bounds are looked at once, and every eighth step whether all have stopped
    assert found.counter.looks.total() <= (5 if "stop_when" in options else 2 if "bounds" in options else 0)


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
