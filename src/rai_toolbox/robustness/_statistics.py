"""Intervals and tests: how sure a figure is, given how many samples it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["McNemar", "mcnemar", "mean_interval", "wilson_interval"]


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    It stays inside [0, 1] and is informative at 0 and at `trials` successes, where the textbook normal
    interval has no width.

    Parameters
    ----------
    successes, trials : int
        How often it happened, out of how many.
    confidence : float
        The coverage aimed at.

    Returns
    -------
    tuple[float, float]
        The lower and the upper end; (0, 1) when there was no trial.

    Raises
    ------
    ValueError
        If `successes` is not between 0 and `trials`, or `confidence` not between 0 and 1.

    References
    ----------
    Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference. JASA 22.

    Examples
    --------
    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and trials = {trials}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
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
    """A paired comparison of two classifiers on the same samples.

    Attributes
    ----------
    only_first, only_second : int
        How many samples only the first, and only the second, gets right.
    p_value : float
        The chance of a split at least as uneven if neither were better (exact binomial, two-sided).
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """Test whether two classifiers differ, from the samples on which they disagree (exact McNemar test).

    Parameters
    ----------
    only_first, only_second : int
        How many samples only the first, and only the second, gets right.

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
