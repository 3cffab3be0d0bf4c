"""Intervals and tests against scipy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rai_toolbox.robustness._statistics import mcnemar, mean_interval, wilson_interval


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case):
    successes, trials = case
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, trials)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= low <= successes / trials <= high <= 1


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    if first + second == 0:
        assert mcnemar(0, 0).p_value == 1.0
        return
    expected = stats.binomtest(first, first + second, 0.5).pvalue
    assert mcnemar(first, second).p_value == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_mean_interval_is_the_normal_one():
    values = [0.1, 0.5, 0.25, 0.9]
    low, high = mean_interval(sum(values), sum(v * v for v in values), 4)
    half = stats.norm.ppf(0.975) * stats.sem(values)
    assert (low, high) == pytest.approx((0.4375 - half, 0.4375 + half))


def test_no_samples_know_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("case", [(-1, 3), (4, 3)])
def test_more_successes_than_trials_are_refused(case):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(*case)
