"""Random models: the worst point and its rate of errors are known where a linear model gets Gaussian noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import Evaluation, InputError, evaluate
from rai_toolbox.robustness._statistics import clopper_pearson_interval

WEIGHT = torch.tensor([0.6, -0.8, 0.0])
NOISE, DRAWS = 0.5, 60


def noisy(x):
    """One logit: the distance to the boundary, with noise; its error rate at a margin m is Phi(-m / NOISE)."""
    return x @ WEIGHT + NOISE * torch.randn(len(x))


def points(count=40):
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32) * 2
    return x, (x @ WEIGHT.numpy() > 0).astype(np.int64)


def test_a_sample_stands_only_where_its_rate_of_errors_is_shown_to_be_below_one_half():
    x, y = points()
    margin = torch.from_numpy(np.abs(x @ WEIGHT.numpy())).double()
    result = evaluate(noisy, (x, y), epsilons=[0.5, 1.0], draws=DRAWS, steps=15, restarts=2, bounds=None)
    # The most errors of the draws with which a sample counts as right, and the chance of no more of them.
    most = max(count for count in range(DRAWS) if clopper_pearson_interval(count, DRAWS)[1] < 0.5)
    assert 15 < most < 30
    for point in result.curves["l2"].points:
        rate = torch.special.ndtr(-(margin - point.epsilon) / NOISE)
        # Where more than half of the draws are errors, no sample stands. The others do unless chance is against them.
        assert point.value <= float((rate < 0.5).double().mean()) + 0.03
        assert point.value >= float((rate < 0.1).double().mean()) - 0.03
    found = {finding.check: finding for finding in result.findings}
    assert found["random-model"].verdict == "warning"
    assert result.trusted


@pytest.mark.parametrize("draws", [2, 5])
def test_too_few_draws_to_show_anything_are_refused(draws):
    with pytest.raises(InputError, match="at least 6"):
        evaluate(noisy, points(), draws=draws)


def test_a_model_that_is_not_random_has_the_same_figures_with_draws():
    x, y = points()
    results = [
        evaluate(lambda x: x @ WEIGHT, (x, y), epsilons=[0.5], draws=draws, steps=15, restarts=2) for draws in (1, 6)
    ]
    assert results[0].curves["l2"].points[1].value == results[1].curves["l2"].points[1].value


def test_the_rate_of_errors_at_the_worst_point_is_that_in_closed_form_and_its_interval_covers_it(tmp_path):
    x, y = points(count=300)
    margin = torch.from_numpy(np.abs(x @ WEIGHT.numpy())).double()
    options: dict[str, Any] = {"steps": 10, "restarts": 2, "bounds": None, "diagnostics": False, "average": 0}
    result = evaluate(noisy, (x, y), epsilons=[0.5, 1.0], draws=DRAWS, **options)
    rates, distance = result.error_rate["l2"], torch.from_numpy(result.distance["l2"])
    for level, point in enumerate(result.curves["l2"].points):
        # The worst point within epsilon lies straight towards the boundary: the noise does not turn the gradient.
        true = torch.special.ndtr((point.epsilon - margin) / NOISE).numpy()
        stands = (distance > point.epsilon).numpy()
        rate, low, high = rates[level].T
        assert ((high < 0.5) == stands).all()
        # Which samples stand was decided by these draws; far from one half they all do, and nothing is selected.
        sure = true < 0.2
        assert sure.sum() > 50
        covered = ((low <= true) & (true <= high))[sure]
        assert covered.mean() >= 0.95 - 3 * (0.95 * 0.05 / covered.size) ** 0.5
        deviation = (true[sure] * (1 - true[sure]) / DRAWS).sum() ** 0.5 / covered.size
        assert abs(rate[sure].mean() - true[sure].mean()) < 4 * deviation
    # At the unperturbed samples nothing is selected at all.
    true = torch.special.ndtr(-margin / NOISE).numpy()
    low, high = rates[0, :, 1], rates[0, :, 2]
    assert ((low <= true) & (true <= high)).mean() >= 0.95 - 3 * (0.95 * 0.05 / len(x)) ** 0.5
    assert ((high - low) < 0.3).all()
    again = Evaluation.load(result.save(tmp_path))
    assert (again.error_rate["l2"] == rates).all()
    header, first = (line.split(",") for line in (tmp_path / "samples.csv").read_text().splitlines()[:2])
    columns = [header.index(f"error_rate{end}_l2_0.5") for end in ("", "_low", "_high")]
    assert [float(first[column]) for column in columns] == rates[1, 0].tolist()
    held = int(((rates[1, :, 1] < 0.5) & (rates[1, :, 2] >= 0.5)).sum())
    assert f'<td data-label="Not shown either way">{held}</td>' in (tmp_path / "report.html").read_text()


def test_one_wrong_answer_at_a_random_point_breaks_no_sample_of_a_random_model():
    x, y = points()
    far = np.abs(x @ WEIGHT.numpy()) > 0.6
    # At epsilon 0.1 some of 20 single answers are wrong for nearly every sample, and none is wrong half of the time.
    options: dict[str, Any] = {"steps": 3, "restarts": 1, "bounds": None, "diagnostics": False, "average": 20}
    result = evaluate(noisy, (x[far], y[far]), epsilons=[0.1], draws=DRAWS, **options)
    assert result.curves["l2"].average[1].error > 0
    assert result.curves["l2"].points[1].value == 1.0
    assert "random point" not in result.found_by["l2"]


def test_a_model_that_is_not_random_has_no_rates():
    x, y = points()
    result = evaluate(lambda x: x @ WEIGHT, (x, y), epsilons=[0.5], steps=2, restarts=1, diagnostics=False)
    assert result.error_rate == {}


@pytest.mark.parametrize("draws", [1, 6])
def test_accuracy_at_zero_is_that_of_the_unperturbed_samples_also_where_the_model_answers_otherwise_later(draws):
    sign = [1.0]

    def fickle(x):
        return sign[0] * x.sum(dim=1)

    def turn(stage, done, total):
        if stage == "Looking at the model":
            sign[0] = -1.0

    x = np.ones((6, 2), np.float32)
    options = {"norms": ["linf", "l2"], "epsilons": [0.5], "steps": 3, "restarts": 1, "diagnostics": False}
    result = evaluate(fickle, (x, np.ones(6)), draws=draws, progress=turn, **options)
    assert result.correct.all()
    for norm, curve in result.curves.items():
        assert [point.value for point in curve.points] == [1.0, 0.0]
        assert (result.distance[norm] > 0).all()
