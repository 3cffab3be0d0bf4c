"""Where a check doubts the gradient, stronger attacks follow: they find the truth, can be left out and gone on with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import evaluate
from rai_toolbox.robustness._results import Finding
from rai_toolbox.robustness.checks._agreement import judged

WEIGHT = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32))
TRUTH = (WEIGHT[:, 1] - WEIGHT[:, 0]).numpy()


def half_hidden(x):
    """A linear model of which the first half of the inputs has no gradient."""
    return torch.cat([x[:, :3].detach(), x[:, 3:]], dim=1) @ WEIGHT


def points(count=12):
    x = np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)
    return x, (torch.from_numpy(x) @ WEIGHT).argmax(dim=1).numpy()


def measured(**options):
    x, y = points()
    exact = np.abs(x @ TRUTH) / np.linalg.norm(TRUTH)
    options = {
        "epsilons": [float(np.quantile(exact, share)) for share in (0.4, 0.7)],
        "steps": 20,
        "restarts": 2,
    } | options
    return exact, evaluate(half_hidden, (x, y), **options)


def test_the_stronger_attacks_find_what_the_gradient_hides_and_say_which_found_it():
    exact, result = measured()
    np.testing.assert_allclose(result.distance["l2"], exact, rtol=0.02)
    found = {finding.check: finding for finding in result.findings}
    assert found["gradient-agreement"].verdict == "warning"  # distrust, before two attacks agreed
    assert found["stronger-attacks"].verdict == "warning"
    by_bpda = found["stronger-attacks"].evidence["nearest errors found by BPDA (l2)"]
    by_differences = found["stronger-attacks"].evidence["nearest errors found by differences (l2)"]
    assert by_bpda + by_differences >= 10
    assert sum(point.also_by_stronger_attacks for point in result.curves["l2"].points) > 0


def test_without_them_the_figures_are_those_of_the_solvers_and_stay_doubted():
    exact, result = measured(adaptive=False)
    assert (result.distance["l2"] > 1.05 * exact).any()
    assert not result.trusted
    assert all(point.also_by_stronger_attacks == 0 for point in result.curves["l2"].points)
    assert not any("Attacking" in stage or "stronger" in stage for stage in result.timings)


def test_a_run_that_ends_among_them_goes_on_to_the_same_figures(tmp_path):
    _, whole = measured(batch_size=6)

    def stops(stage, done, total):
        if stage.startswith("Attacking") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(batch_size=6, folder=tmp_path, progress=stops)
    _, resumed = measured(batch_size=6, folder=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed.distance["l2"], whole.distance["l2"])
    assert [finding.verdict for finding in resumed.findings] == [finding.verdict for finding in whole.findings]


def test_a_model_of_values_gets_none():
    x, _ = points()

    def values(x):
        return half_hidden(x) * torch.tensor([1.0, -1.0])

    y = values(torch.from_numpy(x)).numpy()
    result = evaluate(values, (x, y + 0.1), task="regression", epsilons=[0.5], steps=10, restarts=1)
    found = {finding.check: finding for finding in result.findings}
    assert found["gradient-agreement"].verdict == "distrust"
    assert found["stronger-attacks"].verdict == "not run"
    assert not any("stronger" in stage for stage in result.timings)


@pytest.mark.parametrize(
    ("options", "verdict"), [({}, "ok"), ({"adaptive": False}, "not run"), ({"budget": "quick"}, "not run")]
)
def test_where_no_stronger_attack_was_run_it_says_whether_one_could_have_been(options, verdict):
    result = evaluate(lambda x: x @ WEIGHT, points(), norms="l2", epsilons=[0.5], steps=5, restarts=1, **options)
    (found,) = [finding for finding in result.findings if finding.check == "stronger-attacks"]
    assert found.verdict == verdict
    assert result.trusted


@pytest.mark.parametrize(("lowered", "verdict"), [(True, "distrust"), (False, "warning")])
def test_attacks_that_changed_the_curve_must_agree_between_the_reported_radii_too(lowered: bool, verdict: str):
    # Both break all samples by the radius 2 and none by 1; between them one is behind.
    attacks = {
        "the solvers": np.full(20, 3.0 if lowered else 1.95),
        "differences": np.full(20, 1.3),
        "decisions": np.full(20, 1.9),
    }
    doubts = tuple(Finding(check, check, "distrust", "So.") for check in ("boundary-jump", "stronger-attacks"))
    found = judged(doubts, {"l2": attacks}, {"l2": (1.0, 2.0)})
    assert [finding.verdict for finding in found] == [verdict, verdict]


@pytest.mark.parametrize(
    ("solvers", "second", "verdict"),
    [(3.0, 1.31, "warning"), (3.0, 1.9, "distrust"), (1.3, 3.0, "distrust")],
    ids=["two lowered it and agree", "one alone lowered it", "one found what the solvers had found"],
)
def test_what_blind_search_found_is_answered_by_two_attacks_that_lowered_the_curve(solvers, second, verdict):
    attacks = {"solvers": np.full(20, solvers), "differences": np.full(20, 1.3), "decisions": np.full(20, second)}
    doubts = tuple(Finding(check, check, "distrust", "So.") for check in ("gradient-masking", "stronger-attacks"))
    masking, _ = judged(doubts, {"l2": attacks}, {"l2": (1.0, 2.0)})
    assert masking.verdict == verdict


@pytest.mark.parametrize(("found", "told"), [(3.0, "found no more"), (1.3, "those of stronger attacks")])
def test_a_warning_says_whose_figures_are_reported(found, told):
    attacks = {"solvers": np.full(20, 3.0), "differences": np.full(20, found), "decisions": np.full(20, found)}
    (agreement,) = judged((Finding("bpda", "bpda", "distrust", "So."),), {"l2": attacks}, {"l2": (1.0, 2.0)})
    assert agreement.verdict == "warning"
    assert told in agreement.summary
