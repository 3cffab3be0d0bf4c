"""The checks on a zoo of models: what misleads is noticed, what is honest raises no alarm."""

from __future__ import annotations

import pytest
import zoo
from zoo_others import HONEST, MISLED

from rai_toolbox.robustness import evaluate

COUNT = 30
# A few of each norm and kind in every run; all of them by `make test-zoo`.
QUICK = {
    "half detached, Linf", "purifier, L2", "moat, Linf", "ReLU, Linf", "bfloat16, Linf", "two classes, L2",
}  # fmt: skip


def cases(which):
    return [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.zoo) for name, case in which.items()]


def evaluated(case, **options):
    grid = zoo.GRIDS[case.norm]
    options = {"norms": case.norm, "epsilons": grid, "restarts": 4, **case.options, **options}
    return evaluate(case.build(), zoo.data_of(case, COUNT), **options)


@pytest.mark.parametrize("case", cases(MISLED))
def test_a_gradient_that_misleads_is_noticed_or_the_figures_are_right_without_it(case):
    result = evaluated(case)
    if result.trusted:
        grid = zoo.GRIDS[case.norm]
        found = [point.value for point in result.curves[case.norm].points[1:]]
        truth = zoo.true_accuracies(case, COUNT, grid)
        assert all(value <= true + 0.05 for value, true in zip(found, truth, strict=True)), (found, truth)


@pytest.mark.parametrize("case", cases(HONEST))
def test_an_honest_model_is_trusted(case):
    result = evaluated(case)
    assert {f.check: f.summary for f in result.findings if f.verdict == "distrust"} == {}
