"""Random models: the worst point and its rate of errors are known where a linear model gets Gaussian noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness._statistics import clopper_pearson_interval

WEIGHT = torch.tensor([0.6, -0.8, 0.0])
NOISE, DRAWS = 0.5, 60


def noisy(x):
    """One logit: the distance to the boundary, with noise; its error rate at a margin m is Phi(-m / NOISE)."""
    return x @ WEIGHT + NOISE * torch.randn(len(x))


def points():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) * 2
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
