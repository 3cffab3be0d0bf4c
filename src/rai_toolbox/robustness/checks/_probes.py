"""Checks of the gradient against the outputs themselves: is it the slope of what the model computes, and does the
margin lead to the boundary?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations.losses import as_logits, margin
from rai_toolbox.robustness._results import Verdict
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._substitutes import random_changes
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, middle, nothing, per_norm

_SAMPLES = 24
_DIRECTIONS = 64
# So many look first; the others only where these leave a doubt.
_FIRST_SAMPLES, _FIRST_DIRECTIONS = 8, 16
_STEPS = 0.3, 1.0  # of epsilon
_ROWS = 4096
_PLACES = 16
_BISECTIONS = 20
_LATE = 0.9

# trust.md says from what distribution.
_CLEAR = 0.97, (0.9, 1.1)
_AFTER_A_STEP_IN_LINF = 0.9, (0.8, 1.25)
_FINE, _BEARABLE = (0.95, (0.8, 1.25)), (0.8, (0.7, 1.4))
_JUMP = 0.5, 1.0
_RISE = 1.5, 2.0
_LEFT = 0.6, 0.95
_CLEAR_JUMP, _CLEAR_RISE, _CLEAR_LEFT = 0.1, 1.1, 0.4
_GRADES: tuple[Verdict, ...] = ("ok", "warning", "distrust")


def in_doubt(context: CheckContext) -> bool:
    """Say whether a first look at gradient and margin leaves a doubt, in any norm, or cannot be had."""
    norms: list[Norm] = [norm for norm in context.subject.settings.norms if norm in context.curves]
    looks = [_first_slopes(context, norm) for norm in norms]
    return not (all(look is not None and look.clear for look in looks) and _first_path(context).clear)


@dataclass(frozen=True)
class _Slopes:
    """How well the gradient foretells the output: at the samples, and after one step along it."""

    at_samples: tuple[float, float]
    after_a_step: tuple[float, float]
    samples: int
    directions: int
    norm: Norm

    @property
    def clear(self) -> bool:
        after = _AFTER_A_STEP_IN_LINF if self.norm == "linf" else _CLEAR
        return _within(*self.at_samples, *_CLEAR) and _within(*self.after_a_step, *after)


def _first_slopes(context: CheckContext, norm: Norm) -> _Slopes | None:
    def look() -> _Slopes | None:
        near = _Neighborhood.of(context, norm, _FIRST_SAMPLES, _FIRST_DIRECTIONS)
        if near is None:
            return None
        return _Slopes(near.compared(_STEPS[0]), near.after_a_step().compared(_STEPS[0]), len(near.x), near.count, norm)

    return context.once(("slopes", norm), look)


def _agreement(context: CheckContext, norm: Norm) -> CheckResult:
    first = _first_slopes(context, norm)
    if first is None:
        return nothing()
    if first.clear:
        evidence = {"samples": first.samples, "directions": first.directions}
        for place, seen in (("", first.at_samples), ("_after_a_step", first.after_a_step)):
            evidence |= {f"correlation_within_0.3_epsilon{place}": seen[0], f"slope_within_0.3_epsilon{place}": seen[1]}
        return CheckResult("ok", "The gradient predicts how the output changes.", evidence)
    near = _Neighborhood.of(context, norm, _SAMPLES, _DIRECTIONS)
    assert near is not None
    evidence: dict[str, Any] = {"samples": len(near.x), "directions": near.count}
    seen = [_graded(near, "", evidence), _graded(near.after_a_step(), "_after_a_step", evidence)]
    grade, correlation, slope = max(seen, key=lambda one: (_GRADES.index(one[0]), -one[1]))
    if grade == "ok":
        return CheckResult("ok", "The gradient predicts how the output changes.", evidence)
    return CheckResult(
        grade,
        f"Along random directions the output does not change as the gradient says (correlation {correlation:.2f},"
        f" slope {slope:.2f}; both should be 1).",
        evidence,
    )


def _graded(near: _Neighborhood, place: str, evidence: dict[str, Any]) -> tuple[Verdict, float, float]:
    seen: list[tuple[Verdict, float, float]] = []
    for part in _STEPS:
        correlation, slope = near.compared(part)
        evidence[f"correlation_within_{part:g}_epsilon{place}"] = correlation
        evidence[f"slope_within_{part:g}_epsilon{place}"] = slope
        fine = _AFTER_A_STEP_IN_LINF if place and near.norm == "linf" else _FINE
        grade = _grade(_within(correlation, slope, *fine), _within(correlation, slope, *_BEARABLE))
        seen.append((grade, correlation, slope))
        if grade == "ok" and part == _STEPS[0]:
            return seen[0]
    # A rounding that is followed straight through is seen as a slope only from farther away.
    grade, correlation, slope = min(seen, key=lambda one: _GRADES.index(one[0]))
    return "warning" if grade == "ok" else grade, correlation, slope


@dataclass
class _Neighborhood:
    """Points, their gradients, and changes around them."""

    context: CheckContext
    norm: Norm
    x: Tensor
    score: Callable[[Tensor, int], Tensor]
    gradient: Tensor
    changes: Tensor
    epsilon: float

    @property
    def count(self) -> int:
        return len(self.changes)

    @classmethod
    def of(cls, context: CheckContext, norm: Norm, samples: int, directions: int) -> _Neighborhood | None:
        x, target = context.batch(samples)
        if not len(x):
            return None
        directions = context.sizes.of_usual(directions, least=min(directions, 16))
        generator = context.subject.generator("gradient agreement", norm)
        changes = random_changes(norm, x.shape[1:], directions, generator).to(x)
        score = _score(context, x, target)
        epsilon = middle(context, norm)
        return cls(context, norm, x, score, _gradient_of(context, x, score), changes, epsilon)

    def after_a_step(self) -> _Neighborhood:
        """Return the same around points that lie epsilon away along the gradient.

        In Linf each entry goes a random part of it: a whole step puts all entries that were equal, such as the
        background of an image, on one value, where an honest network can have a kink for all of them at once.
        """
        rows = self.x.flatten(1)
        radius = torch.full((len(rows), 1), self.epsilon, dtype=torch.float64, device=rows.device)
        bounds = self.context.subject.box.of(self.x)
        low, high = (None, None) if bounds is None else (bound.expand(self.x.shape).flatten(1) for bound in bounds)
        ball = Ball(self.norm, rows, radius, low, high)
        gradient = self.gradient.flatten(1).to(ball.dtype).nan_to_num(0.0, 0.0, 0.0)
        length = self.context.width if self.norm == "l0" else self.epsilon
        step = length * ball.steepest(gradient)
        if self.norm == "linf":
            generator = self.context.subject.generator("gradient agreement", self.norm, "step")
            step = step * torch.rand(step.shape, generator=generator).to(step)
        x = ball.land(ball.project_(step)).reshape(self.x.shape)
        return replace(self, x=x, gradient=_gradient_of(self.context, x, self.score))

    def compared(self, part: float) -> tuple[float, float]:
        """Return the medians over the points of the correlation of what the gradient predicts with what central
        differences within this part of epsilon measure, and of the slope of the one against the other.
        """
        length = part * (min(self.epsilon, self.context.width) if self.norm == "l0" else self.epsilon)
        changes = self.changes * length
        foretold = (self.gradient.flatten(1).double() @ changes.flatten(1).double().T).T
        with torch.no_grad():
            measured = (self._moved(changes) - self._moved(-changes)) / 2
        both, alone = (measured * foretold).sum(dim=0), foretold.square().sum(dim=0)
        correlation = both / (alone * measured.square().sum(dim=0)).sqrt().clamp_min(1e-30)
        slope = both / alone.clamp_min(1e-30)
        return float(correlation.nan_to_num().median()), float(slope.nan_to_num().median())

    def _moved(self, changes: Tensor) -> Tensor:
        values = []
        for part in changes.split(max(1, _ROWS // len(self.x))):
            output = self.context.subject.model((self.x[None] + part[:, None]).flatten(0, 1))
            values.append(self.score(output, len(part)).reshape(len(part), -1))
        return torch.cat(values).double()


def _gradient_of(context: CheckContext, x: Tensor, score: Callable[[Tensor, int], Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(score(context.subject.model(leaf), 1).sum(), leaf)[0]


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


def _within(correlation: float, slope: float, least: float, span: tuple[float, float]) -> bool:
    return correlation >= least and span[0] <= slope <= span[1]


def _grade(fine: bool, bearable: bool) -> Verdict:
    return "ok" if fine else "warning" if bearable else "distrust"


@dataclass(frozen=True)
class _Path:
    """What the margin does on the way to another class, in clean margins; NaN where there is no such way."""

    samples: int = 0
    jump: float = math.nan
    rise: float = math.nan
    left: float = math.nan

    @property
    def clear(self) -> bool:
        small = self.jump < _CLEAR_JUMP and self.rise < _CLEAR_RISE and self.left < _CLEAR_LEFT
        return small or not self.samples


def _first_path(context: CheckContext) -> _Path:
    return context.once("path", lambda: _walked(context, _FIRST_SAMPLES))


def _boundary(context: CheckContext) -> CheckResult:
    if not len(context.subset_indices(_SAMPLES)):
        return nothing()
    path = _first_path(context)
    if not path.clear:
        path = _walked(context, _SAMPLES)
    if not path.samples:
        return CheckResult("not run", "There are no two samples of different classes that the model gets right.")
    evidence = {
        "samples": path.samples,
        "median_jump_in_clean_margins": path.jump,
        "median_rise_in_clean_margins": path.rise,
        "median_left_at_nine_tenths_of_the_way": path.left,
    }
    grade = _grade(
        path.jump < _JUMP[0] and path.rise < _RISE[0] and path.left < _LEFT[0],
        path.jump < _JUMP[1] and path.rise < _RISE[1] and path.left < _LEFT[1],
    )
    if grade == "ok":
        return CheckResult("ok", "On the way to another class the margin falls until it is zero.", evidence)
    if path.jump < _JUMP[0] and path.rise < _RISE[0]:
        message = (
            f"On the way to another class {100 * path.left:.0f} % of the margin is left nine tenths of the way to the"
            " boundary: an attack that follows the margin is told of it late."
        )
        return CheckResult(grade, message, evidence)
    return CheckResult(
        grade,
        f"On the way to another class the margin rises to {path.rise:.2g} times what it was and jumps by"
        f" {path.jump:.2g} times that at the boundary: an attack that follows the margin is led away.",
        evidence,
    )


def _walked(context: CheckContext, count: int) -> _Path:
    """Go from samples straight to the nearest ones of another class."""
    x, target = context.batch(count)
    subject = context.subject
    pool, labels = context.batch(4 * _SAMPLES)
    gap = torch.cdist(x.flatten(1).double(), pool.flatten(1).double())
    gap = torch.where(target[:, None] == labels[None], torch.inf, gap)
    able = gap.isfinite().any(dim=1)
    if not able.any():
        return _Path()
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
    return _Path(
        len(x),
        float(((at(first_wrong) - at(last_correct)) / size).median()),
        float((deepest.abs() / size).median()),
        float((at(_LATE * last_correct).abs() / size).median()),
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
