"""What an evaluation is going to cost: samples times passes times a pass that was measured."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rai_toolbox import frozen
from rai_toolbox.kernels._machine import kind_of
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.robustness._errors import arg
from rai_toolbox.robustness.attack._budget import USUAL_RESTARTS, USUAL_STEPS
from rai_toolbox.robustness.attack._subject import Subject

# Of the samples that are right, how many stand at a radius of a grid that reaches to where nearly none does, and at
# one of a grid that was asked for, about.
_STANDING = 0.25
_STANDING_ASKED = 0.5
# Of the steps of runs that go through the classes: a run that does not get across ends after half.
_OF_A_LOOK = 0.6
_MOST_CLASSES = 9
_MOST_RANKED = 18
# A measurement takes about so long, at most a few times that.
_SECONDS = 1.0


@dataclass(frozen=True)
class Passes:
    """How many samples go through the model, forward only or forward and backward, and in how many calls."""

    forward: float = 0.0
    both: float = 0.0
    forward_calls: float = 0.0
    both_calls: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def on(self, samples: float) -> Passes:
        """Return the passes of so many samples at a time, where these are those of one."""
        return Passes(self.forward * samples, self.both * samples, self.forward, self.both)

    def times(self, factor: float) -> Passes:
        """Return so many times as much of all."""
        return Passes(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class _Costs:
    """Seconds of a call and, beside that, of a sample in it: forward, and forward and backward in a solver."""

    forward: tuple[float, float]
    both: tuple[float, float]

    def of(self, passes: Passes) -> float:
        forward = self.forward[0] * passes.forward_calls + self.forward[1] * passes.forward
        return forward + self.both[0] * passes.both_calls + self.both[1] * passes.both


@dataclass(frozen=True)
class Estimate:
    """The cost of an evaluation."""

    # attacks, checks: seconds
    attacks: float
    checks: float
    samples: int  # that the solvers work on: those that the model gets right
    passes: float  # of each, forward and backward
    seconds_per_pass: float  # for one sample

    def __str__(self) -> str:
        total = self.attacks + self.checks
        parts = (
            f"{self.samples} samples x {self.passes:.0f} passes x {_spelled(self.seconds_per_pass)} ="
            f" {_clock(self.attacks)} for the attacks, {_clock(self.checks)} for the checks"
        )
        shorter = ", ".join(
            (arg("budget", "quick"), arg("samples"), arg("steps"), arg("restarts"), arg("diagnostics", "False"))
        )
        return f"about {_clock(total)} ({parts}); shorter with {shorter}, or ended by {arg('time_limit')}"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(1, round(seconds))))


def _spelled(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def estimate(subject: Subject, right: int, outputs: int, *, share_left: float = 1.0, processes: int = 1) -> Estimate:
    """Return the cost of what follows the look at the model.

    right: how many samples the model gets right (regression: how many there are).
    outputs: of the model.
    share_left: of the batches, how many an earlier run has not done.
    processes: that share the work.
    """
    costs = _measured(subject)
    # Batches differ by little: each is one of the mean size.
    attacks = passes_of_attacks(subject, right / subject.batches, outputs).times(subject.batches)
    checks = passes_of_checks(subject, right, outputs) if subject.settings.diagnostics else Passes()
    seconds = costs.of(attacks)
    return Estimate(
        seconds * share_left / processes, costs.of(checks) / processes, right, attacks.both / right,
        seconds / max(1.0, attacks.both),
    )  # fmt: skip


def passes_of_attacks(subject: Subject, right: float, outputs: int) -> Passes:
    """Return what the attacks on a batch of so many samples take: the search, and a try at each radius."""
    settings, sizes = subject.settings, subject.settings.sizes
    total = Passes()
    for norm in settings.norms:
        asked = settings.grid(norm)
        radii = len(asked) or sizes.radii
        total += Passes(settings.average).on(right).times(radii)
        if not subject.classifies:
            total += Passes(3, sizes.steps * sizes.restarts).on(right).times(radii)
            continue
        total += _search(norm, sizes.steps, sizes.restarts, outputs).on(right)
        standing = right * (_STANDING_ASKED if asked else _STANDING)
        total += _try(norm, sizes.steps, sizes.restarts, outputs).on(standing).times(radii)
    return total


def _search(norm: str, steps: int, restarts: int, outputs: int) -> Passes:
    if norm == "l0":
        classes = min(_MOST_CLASSES, max(1, outputs - 1))
        return Passes(4 + steps, 1.5 * steps * restarts + 2 * classes * steps)
    return Passes(20, (restarts + 1.5) * steps)


def _try(norm: str, steps: int, restarts: int, outputs: int) -> Passes:
    classes = min(_MOST_CLASSES, max(1, outputs - 1))
    if restarts <= classes:
        return Passes(3, steps * restarts)
    # One run within the ball, a look at each class; more runs only where they are promising.
    ranked = min(_MOST_RANKED, outputs - 1) if outputs > 2 else 0
    return Passes(3, steps / 2 + ranked + classes * _OF_A_LOOK * steps)


def passes_of_checks(subject: Subject, right: int, outputs: int) -> Passes:
    """Return how many samples the checks send through the model in all, about."""
    settings, sizes = subject.settings, subject.settings.sizes
    steps, restarts = sizes.steps, sizes.restarts

    def of(count: int) -> int:
        return min(right, sizes.of_usual(count))

    total = Passes(4, 1).on(of(64)) + Passes(4).on(of(16)) + Passes(40 * subject.classifies).on(of(24))
    more = (4 * steps, restarts) if sizes.checked < 1 else (max(4 * steps, USUAL_STEPS), _more_restarts(restarts))
    blind = Passes(sum(map(sizes.of_usual, (50, 500, 200))))
    for norm in settings.norms:
        changes = 2.2 * sizes.of_usual(64, least=16) * of(24)
        total += Passes(changes, 0, max(2.0, changes / 4096), 0) + Passes(2, 10).on(of(64))
        if not subject.classifies:
            total += Passes(0, 5 * steps * restarts).on(of(24)) + Passes(0, steps * restarts).on(of(48))
            continue
        total += _search(norm, max(1, steps // 4), restarts, outputs).on(of(24))
        total += _search(norm, *more, outputs).on(of(24))
        total += blind.on(of(16))
        if "finite-differences" not in sizes.without:
            total += Passes(of(16) * 2 * 24 * 129, 0, 150, 0)
        if "transfer" not in sizes.without:
            total += Passes(2256, 0, 3, 0) + Passes(0, 80).on(of(16))
    if subject.classifies and sizes.checked == 1 and "linf" not in settings.norms:
        total += blind.on(of(16)) + _search("linf", steps, 6, outputs).on(of(16))
    return total


def _more_restarts(restarts: int) -> int:
    """As the check of convergence has it."""
    return 1 if restarts >= 4 else USUAL_RESTARTS


def _measured(subject: Subject) -> _Costs:
    """Measure a pass: of a full batch and of a small one, and what a solver does around it."""
    x, _ = subject.batch(*subject.span(0))
    model, small = subject.model, x[: max(1, len(x) // 8)]
    with torch.enable_grad(), frozen(*subject.modules):
        both = [_seconds(lambda part=part: _both(model, part), subject) for part in (x, small)]
    forward = [_seconds(lambda part=part: _forward(model, part), subject) for part in (x, small)]
    around = _around(subject, x), _around(subject, small)
    in_solver = _line(both[0] + around[0], both[1] + around[1], len(x), len(small))
    return _Costs(_line(forward[0], forward[1], len(x), len(small)), in_solver)


def _line(large: float, small: float, count: int, few: int) -> tuple[float, float]:
    """Return what a call takes and what each sample in it, from the times of a large and of a small batch."""
    if count == few:
        return 0.0, large / count
    fixed = min(max(0.0, (small * count - large * few) / (count - few)), large)
    return fixed, (large - fixed) / count


def _around(subject: Subject, x: Tensor) -> float:
    """Return the seconds that a solver takes for a step by itself, about: half of a projection from far outside."""
    rows, bounds = x.flatten(1), subject.box.of(x)
    lower, upper = (None, None) if bounds is None else (bound.expand(x.shape).flatten(1) for bound in bounds)
    size = rows.shape[1] if subject.settings.norms[0] == "l0" else rows.abs().sum(dim=1, keepdim=True).double()
    radius = torch.zeros(len(rows), 1, dtype=torch.float64, device=x.device) + 0.01 * size
    ball = Ball(
        subject.settings.norms[0], rows, radius.round() if subject.settings.norms[0] == "l0" else radius, lower, upper
    )
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
    delta = 0.1 * gradient

    def step() -> None:
        ball.land(ball.project_(delta.to(ball.dtype) + ball.steepest(gradient)))

    return 0.5 * _seconds(step, subject)


def _seconds(work: Callable[[], None], subject: Subject) -> float:
    """Return the seconds that a function takes: the median of a few times where these are short.

    Beside other work some of them may take fifty times as long as the others: so there are fifteen.
    """
    taken: list[float] = []
    while not taken or (sum(taken) < _SECONDS and len(taken) < 15):
        begun = time.perf_counter()
        work()
        if kind_of(subject.device) == "cuda":
            torch.cuda.synchronize(subject.device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[len(taken) // 2]


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _both(model: nn.Module, x: Tensor) -> None:
    leaf = x.detach().clone().requires_grad_()
    torch.autograd.grad(model(leaf).float().sum(), leaf)
