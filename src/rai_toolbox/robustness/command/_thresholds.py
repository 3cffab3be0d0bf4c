"""What the figures are held to: the thresholds of `--fail-under`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rai_toolbox.robustness._results import Point
from rai_toolbox.robustness.command._options import Threshold
from rai_toolbox.robustness.report._evaluation import Evaluation


@dataclass(frozen=True)
class Held:
    """A threshold, and what was found."""

    threshold: Threshold  # the least accuracy at a radius
    point: Point | None  # the figure; None where the time limit came first
    reason: str | None  # why the threshold is not met; None if it is


def held(thresholds: Sequence[Threshold], evaluation: Evaluation) -> tuple[Held, ...]:
    """Return for each threshold whether it is met."""
    return tuple(_held(threshold, evaluation) for threshold in thresholds)


def _held(threshold: Threshold, evaluation: Evaluation) -> Held:
    norm, epsilon, least = threshold.norm, threshold.epsilon, threshold.accuracy
    point = evaluation.curves[norm].at(epsilon) if norm in evaluation.curves else None
    reason = None
    if point is not None and not point.value >= least:
        reason = f"accuracy at {norm}:{epsilon:g} is {point.value:.4f}, below {least:g}"
    elif not evaluation.complete or point is None:
        # A sample that was not tried counts as standing.
        reason = f"accuracy at {norm}:{epsilon:g} is not known to reach {least:g}: the run is partial"
    return Held(threshold, point, reason)
