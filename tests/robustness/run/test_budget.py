"""How much work a budget is, and whether what is told beforehand is true."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness.run import _run
from rai_toolbox.robustness.run._passes import CHECKS, passes_by_stage


def test_a_budget_that_is_none_is_told_which_are(half_plane, blobs):
    with pytest.raises(InputError, match=r"budget must be one of quick, standard, thorough, got 'quik'$"):
        evaluate(half_plane, blobs, budget="quik")


@pytest.fixture
def told(monkeypatch):
    """What is estimated, and what goes through the model after that, in the attacks and in the checks."""
    seen: dict[str, Any] = {"actual": {"attacks": 0, "checks": 0}}
    estimate, run_check = _run.estimate, _run.run_check

    def kept(subject, right, outputs, **options):
        result = estimate(subject, right, outputs, **options)
        expected = {"attacks": 0.0, "checks": 0.0}
        for stage, _, passes in passes_by_stage(subject, right, outputs):
            expected["checks" if stage == CHECKS else "attacks"] += passes.samples
        seen.update(estimate=result, expected=expected, subject=subject, before=subject.model.forwards)
        return result

    def counted(check, context, *rest, **options):
        before = context.subject.model.forwards
        finding = run_check(check, context, *rest, **options)
        seen["actual"]["checks"] += context.subject.model.forwards - before
        return finding

    monkeypatch.setattr(_run, "estimate", kept)
    monkeypatch.setattr(_run, "run_check", counted)

    def progress(*_):
        pass

    vars(progress)["say"] = lambda words: seen.__setitem__("words", words)

    def run(*args, **options):
        result = evaluate(*args, progress=progress, **options)
        seen["actual"]["attacks"] = seen["subject"].model.forwards - seen["before"] - seen["actual"]["checks"]
        return result, seen

    return run


@pytest.mark.parametrize(
    ("net", "norm", "budget"),
    [
        ("small_net", "l2", "quick"),
        ("digits_net", "linf", "quick"),
        ("digits_net", "l1", "quick"),
        ("small_net", "l0", "quick"),
        ("small_net", "linf", "standard"),
    ],
)
def test_passes_are_as_many_as_expected_within_thirty_percent(net, norm, budget, told, request, digits):
    net = request.getfixturevalue(net)
    _, seen = told(net, (digits[0][:30], digits[1][:30]), norms=norm, budget=budget)
    assert seen["expected"] == pytest.approx(seen["actual"], rel=0.3)


def test_corruptions_random_points_and_the_radii_that_are_asked_for_are_counted(told, small_net, digits):
    options = {"epsilons": [0.5, 1.0], "average": 7, "severities": (1, 2, 3), "diagnostics": False, "budget": "quick"}
    _, seen = told(small_net, (digits[0][:30], digits[1][:30]), corruptions=lambda x, severity: x + severity, **options)
    by_stage = {stage: passes for stage, _, passes in passes_by_stage(seen["subject"], seen["estimate"].samples, 10)}
    assert by_stage["average"].forward == 30 * 7 * 2
    assert by_stage["corruptions"].forward == 30 * 3
    assert seen["expected"]["attacks"] == pytest.approx(seen["actual"]["attacks"], rel=0.3)


def test_what_is_told_is_a_range_around_the_usual_time(told, small_net, digits):
    result, seen = told(small_net, (digits[0][:40], digits[1][:40]), norms="linf", budget="quick")
    assert sum(seen["actual"].values()) < 160 * 40
    assert re.match(
        r"about \d:\d\d:\d\d, between \d:\d\d:\d\d and \d:\d\d:\d\d \(\d+ samples x \d+ passes x ", seen["words"]
    )
    cost = seen["estimate"]
    assert 0 < cost.low <= cost.attacks + cost.checks <= cost.high
    verdicts = {finding.check: finding.verdict for finding in result.findings}
    assert verdicts["transfer"] == verdicts["finite-differences"] == "not run"
    assert result.settings["budget"] == "quick"
    assert len(result.curves["linf"].points) <= 6


def test_steps_and_restarts_that_are_asked_for_win(told, small_net, digits):
    data = digits[0][:10], digits[1][:10]
    _, seen = told(small_net, data, budget="quick", steps=3, restarts=1, diagnostics=False)
    sizes = seen["subject"].settings.sizes
    assert (sizes.steps, sizes.restarts, sizes.radii) == (3, 1, 4)
