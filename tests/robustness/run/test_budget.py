"""How much work a budget is, and whether what is told beforehand is true."""

from __future__ import annotations

import re

import pytest

from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness.run import _estimate, _run


def test_a_budget_that_is_none_is_told_which_are(half_plane, blobs):
    with pytest.raises(InputError, match="budget must be one of quick, standard, thorough, got 'quik'; did you mean"):
        evaluate(half_plane, blobs, budget="quik")


@pytest.fixture
def told(monkeypatch):
    """What is estimated, and what goes through the model after that."""
    seen = {}
    estimate = _run.estimate

    def kept(subject, right, outputs, **options):
        result = estimate(subject, right, outputs, **options)
        parts = (
            _estimate.passes_of_attacks(subject, right, outputs),
            _estimate.passes_of_checks(subject, right, outputs),
        )
        seen["passes"] = sum(part.forward + part.both for part in parts)
        seen["subject"], seen["before"] = subject, subject.model.forwards
        return result

    monkeypatch.setattr(_run, "estimate", kept)

    def progress(*_):
        pass

    vars(progress)["say"] = lambda words: seen.__setitem__("words", words)
    return seen, progress


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_quick_is_few_passes_and_the_estimate_of_them_is_true(norm, told, small_net, digits):
    seen, progress = told
    result = evaluate(small_net, (digits[0][:40], digits[1][:40]), norms=norm, budget="quick", progress=progress)
    passed = seen["subject"].model.forwards - seen["before"]
    assert 0.7 < seen["passes"] / passed < 1.3
    assert passed < 160 * 40
    assert re.match(r"about \d:\d\d:\d\d \(\d+ samples x \d+ passes x ", seen["words"])
    verdicts = {finding.check: finding.verdict for finding in result.findings}
    assert verdicts["transfer"] == verdicts["finite-differences"] == "not run"
    assert result.settings["budget"] == "quick"
    assert len(result.curves[norm].points) <= 6


def test_steps_and_restarts_that_are_asked_for_win(told, small_net, digits):
    seen, progress = told
    data = digits[0][:10], digits[1][:10]
    evaluate(small_net, data, budget="quick", steps=3, restarts=1, diagnostics=False, progress=progress)
    sizes = seen["subject"].settings.sizes
    assert (sizes.steps, sizes.restarts, sizes.radii) == (3, 1, 4)
