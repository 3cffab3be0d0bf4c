"""What the checks cost beside the evaluation, in samples through the model: a small part where nothing is wrong."""

from __future__ import annotations

import pytest
import zoo
from counting import CHECK_NAMES, Counted, Stages, share_of_checks

from rai_toolbox.robustness import evaluate

RIVALS = {"gradient-masking", "finite-differences", "transfer"}


def counted(case, count, **options):
    model = Counted(case.build())
    options = {"norms": case.norm, "epsilons": zoo.GRIDS[case.norm], **case.options, **options}
    result = evaluate(model, zoo.data_of(case, count), progress=Stages(model), **options)
    return model.rows, {finding.check: finding for finding in result.findings}


@pytest.mark.parametrize(
    "name",
    ["ReLU, Linf", pytest.param("tanh, L2", marks=pytest.mark.slow), pytest.param("tanh, L1", marks=pytest.mark.slow)],
)
def test_the_checks_of_an_honest_model_cost_a_quarter_of_a_small_evaluation(name):
    rows, found = counted(zoo.HONEST[name], 30)
    assert {
        check: finding.verdict for check, finding in found.items() if finding.verdict in ("warning", "distrust")
    } == {}
    # Looking for a longer search than the default one is what convergence is for: it has a share of its own.
    others = {stage: count for stage, count in rows.items() if stage != "convergence"}
    assert set(others) & CHECK_NAMES > {"gradient-agreement", "boundary-jump", "loss-rises"}
    assert share_of_checks(others) < 0.16
    assert share_of_checks(rows) < 0.25


def test_rivals_are_left_out_of_a_small_evaluation_without_doubt_and_tried_in_full_with_one():
    honest = zoo.HONEST["ReLU, Linf"]
    rows, found = counted(honest, 16, restarts=1, steps=20)
    assert {found[name].verdict for name in RIVALS} == {"not run"}
    assert not any("could_not_be_made" in found[name].evidence for name in RIVALS)
    assert not RIVALS & set(rows)
    misled = zoo.Wrapped(zoo.relu(), zoo.with_backward(lambda x: x.clone(), lambda x, grad: grad.roll(3, -1)))
    rows, found = counted(zoo.Case(lambda: misled, "linf"), 16, restarts=1, steps=20, adaptive=False)
    assert found["gradient-agreement"].verdict == "distrust"
    assert set(rows) >= RIVALS
    assert found["finite-differences"].evidence["samples"] == found["transfer"].evidence["samples"] > 8
