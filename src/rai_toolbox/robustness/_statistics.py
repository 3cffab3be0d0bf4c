"""Intervals and tests: how sure a figure is, given how many samples it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    It stays inside [0, 1] and is informative at 0 and at `trials` successes, where the textbook normal
    interval has no width.

    successes, trials: how often it happened, out of how many.
    confidence: the coverage aimed at.

    Returns the lower and the upper end; (0, 1) when there was no trial.

    Raises ValueError if `successes` is not between 0 and `trials`, or `confidence` not between 0 and 1.

    References
    ----------
    Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference. JASA 22.

    Examples
    --------
    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    _check_counts(successes, trials, confidence)
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    shrink = 1 + z * z / trials
    center = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == trials else min(1.0, center + half)
    return low, high


def clopper_pearson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval of a proportion.

    It covers the true proportion at least as often as `confidence` says, for every proportion and every number of
    trials. The trials may have different chances of success: it covers their mean then [2]_.

    successes, trials: how often it happened, out of how many independent trials.
    confidence: the least coverage.

    Returns the lower and the upper end; (0, 1) when there was no trial.

    Raises ValueError: as `wilson_interval`.

    References
    ----------
    .. [1] C. J. Clopper, E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case of the
       binomial", Biometrika 26, 1934.
    .. [2] W. Hoeffding, "On the distribution of the number of successes in independent trials", Annals of Mathematical
       Statistics 27, 1956.

    Examples
    --------
    >>> [round(end, 4) for end in clopper_pearson_interval(8, 10)]
    [0.4439, 0.9748]
    """
    _check_counts(successes, trials, confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _beta_quantile(tail, successes, trials - successes + 1)
    high = 1.0 if successes == trials else 1.0 - _beta_quantile(tail, trials - successes, successes + 1)
    return low, high


def _beta_quantile(share: float, a: float, b: float) -> float:
    """Return where the distribution function of Beta(a, b) is `share`, by bisection."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2
        if not low < middle < high or high - low <= 1e-15 * high:
            return middle
        low, high = (middle, high) if _beta_cdf(middle, a, b) < share else (low, middle)


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function: its continued fraction (DLMF 8.17.22), by Lentz's method."""
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast for the complement
        return 1.0 - _beta_cdf(1.0 - x, b, a)
    if x <= 0.0:
        return 0.0
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(100_000):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / ((1.0 + term * d) or 1e-300)
        c = (1.0 + term / c) or 1e-300
        fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return math.exp(logs) / a * (fraction - 1.0)


def _check_counts(successes: int, trials: int, confidence: float) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and trials = {trials}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def mean_interval(total: float, total_of_squares: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the large-sample (normal) interval of a mean from the sums of the values and of their squares.

    Examples
    --------
    >>> [round(end, 3) for end in mean_interval(6.0, 14.0, 3)]
    [0.868, 3.132]
    """
    if count == 0:
        return 0.0, math.inf
    mean = total / count
    if count == 1:
        return -math.inf, math.inf
    variance = max(0.0, (total_of_squares - count * mean * mean) / (count - 1))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance / count)
    return mean - half, mean + half


@dataclass(frozen=True)
class McNemar:
    """A paired comparison of two classifiers on the same samples."""

    # only_first, only_second: how many samples only the first, and only the second, gets right
    only_first: int
    only_second: int
    p_value: float  # the chance of a split at least as uneven if neither were better (exact binomial, two-sided)


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """Test whether two classifiers differ, from the samples on which they disagree (exact McNemar test).

    only_first, only_second: how many samples only the first, and only the second, gets right.

    References
    ----------
    McNemar, Q. (1947). Note on the sampling error of the difference between correlated proportions. Psychometrika 12.

    Examples
    --------
    >>> round(mcnemar(1, 9).p_value, 5)
    0.02148
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must not be negative, got {only_first} and {only_second}")
    discordant = only_first + only_second
    if discordant == 0:
        return McNemar(only_first, only_second, 1.0)
    fewer = min(only_first, only_second)
    # Sum of the tail in logarithms: 0.5 ** discordant underflows beyond about a thousand.
    logs = [
        math.lgamma(discordant + 1) - math.lgamma(k + 1) - math.lgamma(discordant - k + 1) - discordant * math.log(2)
        for k in range(fewer + 1)
    ]
    peak = max(logs)
    tail = math.exp(peak) * sum(math.exp(value - peak) for value in logs)
    return McNemar(only_first, only_second, min(1.0, 2 * tail))
