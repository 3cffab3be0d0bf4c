"""Checks of the gradient against the outputs themselves: is it the slope of what the model computes, and does the
margin lead to the boundary?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations.losses import as_logits, margin
from rai_toolbox.robustness._results import Verdict
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._substitutes import random_changes
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, middle, nothing, per_norm

_SAMPLES = 24
_DIRECTIONS = 64
_STEPS = 0.3, 1.0  # of epsilon
_ROWS = 4096
_PLACES = 16
_BISECTIONS = 20

# trust.md says from what distribution.
_CORRELATION = 0.95, 0.8
_SLOPE = (0.8, 1.25), (0.7, 1.4)
_JUMP = 0.5, 1.0
_RISE = 1.5, 2.0
_GRADES: tuple[Verdict, ...] = ("ok", "warning", "distrust")


def _agreement(context: CheckContext, norm: Norm) -> CheckResult:
    x, target = context.batch(_SAMPLES)
    if not len(x):
        return nothing()
    subject = context.subject
    epsilon = middle(context, norm)
    score = _score(context, x, target)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(subject.model(leaf), 1).sum(), leaf)
    directions = context.sizes.of_usual(_DIRECTIONS, least=16)
    changes = random_changes(norm, x.shape[1:], directions, subject.generator("gradient agreement", norm)).to(x)
    evidence: dict[str, Any] = {"samples": len(x), "directions": directions}
    seen: list[tuple[Verdict, float, float]] = []
    for part in _STEPS:
        length = part * (min(epsilon, context.width) if norm == "l0" else epsilon)
        correlation, slope = _compared(context, x, score, gradient, changes * length)
        evidence[f"correlation_within_{part:g}_epsilon"] = correlation
        evidence[f"slope_within_{part:g}_epsilon"] = slope
        grade = _grade(
            correlation >= _CORRELATION[0] and _SLOPE[0][0] <= slope <= _SLOPE[0][1],
            correlation >= _CORRELATION[1] and _SLOPE[1][0] <= slope <= _SLOPE[1][1],
        )
        seen.append((grade, correlation, slope))
        if grade == "ok" and part == _STEPS[0]:
            return CheckResult("ok", "The gradient predicts how the output changes.", evidence)
    # A rounding that is followed straight through is seen as a slope only from farther away.
    grade, correlation, slope = min(seen, key=lambda one: _GRADES.index(one[0]))
    return CheckResult(
        "warning" if grade == "ok" else grade,
        f"Along random directions the output does not change as the gradient says (correlation {correlation:.2f},"
        f" slope {slope:.2f}; both should be 1).",
        evidence,
    )


def _compared(
    context: CheckContext, x: Tensor, score: Callable[[Tensor, int], Tensor], gradient: Tensor, changes: Tensor
) -> tuple[float, float]:
    """Return the medians over the samples of the correlation of what the gradient predicts with what central
    differences measure, and of the slope of the one against the other.
    """
    foretold = (gradient.flatten(1).double() @ changes.flatten(1).double().T).T

    def moved(sign: float) -> Tensor:
        values = []
        for part in changes.split(max(1, _ROWS // len(x))):
            output = context.subject.model((x[None] + sign * part[:, None]).flatten(0, 1))
            values.append(score(output, len(part)).reshape(len(part), -1))
        return torch.cat(values).double()

    with torch.no_grad():
        measured = (moved(1.0) - moved(-1.0)) / 2
    both, alone = (measured * foretold).sum(dim=0), foretold.square().sum(dim=0)
    correlation = both / (alone * measured.square().sum(dim=0)).sqrt().clamp_min(1e-30)
    slope = both / alone.clamp_min(1e-30)
    return float(correlation.nan_to_num().median()), float(slope.nan_to_num().median())


def _score(context: CheckContext, x: Tensor, target: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the score to differentiate: by how much the rival that is nearest at the samples exceeds the target, or
    the sum of all outputs; of outputs that repeat the samples so many times.
    """
    if not context.subject.classifies:
        return lambda output, times: output.float().sum(dim=1)
    with torch.no_grad():
        logits = as_logits(context.subject.model(x), target)
    rival = logits.scatter(1, target[:, None], -torch.inf).argmax(dim=1)

    def score(output: Tensor, times: int) -> Tensor:
        mine, its = target.repeat(times), rival.repeat(times)
        both = as_logits(output, mine)
        return (both.gather(1, its[:, None]) - both.gather(1, mine[:, None]))[:, 0]

    return score


def _grade(fine: bool, bearable: bool) -> Verdict:
    return "ok" if fine else "warning" if bearable else "distrust"


def _boundary(context: CheckContext) -> CheckResult:
    x, target = context.batch(_SAMPLES)
    if not len(x):
        return nothing()
    subject = context.subject
    pool, labels = context.batch(4 * _SAMPLES)
    gap = torch.cdist(x.flatten(1).double(), pool.flatten(1).double())
    gap = torch.where(target[:, None] == labels[None], torch.inf, gap)
    able = gap.isfinite().any(dim=1)
    if not able.any():
        return CheckResult("not run", "There are no two samples of different classes that the model gets right.")
    x, target, other = x[able], target[able], pool[gap.argmin(dim=1)[able]]

    def at(place: Tensor) -> Tensor:
        """Return the margin at these shares of the way from each sample to another one of another class."""
        share = place.reshape(-1, *[1] * (x.ndim - 1))
        with torch.no_grad():
            return margin(
                subject.model((x.double() + share * (other.double() - x.double())).to(x.dtype)), target
            ).double()

    clean = at(torch.zeros(len(x), dtype=torch.float64, device=x.device))
    last_correct, first_wrong, deepest = _bracket(at, clean)
    for _ in range(_BISECTIONS):
        half = (last_correct + first_wrong) / 2
        value = at(half)
        deepest = torch.where(value <= 0, torch.minimum(deepest, value), deepest)
        last_correct, first_wrong = (
            torch.where(value > 0, last_correct, half),
            torch.where(value > 0, half, first_wrong),
        )
    size = clean.abs().clamp_min(1e-30)
    jump = float(((at(first_wrong) - at(last_correct)) / size).median())
    rise = float((deepest.abs() / size).median())
    evidence = {"samples": len(x), "median_jump_in_clean_margins": jump, "median_rise_in_clean_margins": rise}
    grade = _grade(jump < _JUMP[0] and rise < _RISE[0], jump < _JUMP[1] and rise < _RISE[1])
    if grade == "ok":
        return CheckResult("ok", "On the way to another class the margin falls until it is zero.", evidence)
    return CheckResult(
        grade,
        f"On the way to another class the margin rises to {rise:.2g} times what it was and jumps by {jump:.2g} times"
        " that at the boundary: an attack that follows the margin is led away.",
        evidence,
    )


def _bracket(at: Callable[[Tensor], Tensor], clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places before and after the first of evenly spaced ones at which the decision has changed, and the
    lowest margin until there.
    """
    last_correct, first_wrong, deepest = torch.zeros_like(clean), torch.ones_like(clean), clean.clone()
    open_yet = torch.ones_like(clean, dtype=torch.bool)
    for number in range(1, _PLACES + 1):
        place = torch.full_like(clean, number / _PLACES)
        value = at(place)
        first_wrong = torch.where(open_yet & (value > 0), place, first_wrong)
        open_yet &= value <= 0
        last_correct = torch.where(open_yet, place, last_correct)
        deepest = torch.where(open_yet, torch.minimum(deepest, value), deepest)
    return last_correct.clamp_max(1.0), first_wrong, deepest


PROBES = (
    Check(
        "gradient-agreement",
        "Does the gradient predict the change of the output?",
        per_norm(_agreement),
        needs_gradient=True,
    ),
    Check("boundary-jump", "Does the margin lead to the boundary?", _boundary, True, True),
)
