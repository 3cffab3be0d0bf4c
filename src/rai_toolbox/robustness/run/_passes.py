"""How many samples an evaluation sends through the model, stage by stage, before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rai_toolbox.robustness.attack._budget import longer_search
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.checks._effort import BLIND, DIFFERENCES, ELSEWHERE, TRANSFER, Rival

#: The stage that no other has to wait for, and that an earlier run has not begun.
CHECKS = "checks"

# How many radii a default grid has, and at how many a sample stands, as shares of those that it may have: it reaches to
# where nearly none stands. And at how many of the radii that were asked for.
_OF_A_GRID = 0.75
_STANDING = 0.28
_STANDING_ASKED = 0.5
# What part of the samples is tried below its nearest error in L0, where radii are few; in how many rounds some of
# a batch is.
_OF_L0 = 0.6
_ROUNDS = 3
# What part of its passes such a sample gets in the other norms, with more runs than classes, before it is given up.
_NOT_GIVEN_UP = {"linf": 0.55, "l2": 0.7, "l1": 0.75}


@dataclass(frozen=True)
class Passes:
    """How many samples go through the model, forward only or forward and backward, and in how many calls."""

    forward: float = 0.0
    both: float = 0.0
    forward_calls: float = 0.0
    both_calls: float = 0.0

    @property
    def samples(self) -> float:
        """How many go through it, either way."""
        return self.forward + self.both

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def on(self, samples: float) -> Passes:
        """Return the passes of so many samples at a time, where these are those of one."""
        return Passes(self.forward * samples, self.both * samples, self.forward, self.both)

    def times(self, factor: float, calls: float | None = None) -> Passes:
        """Return so many times as many passes, in so many times as many calls."""
        calls = factor if calls is None else calls
        return Passes(factor * self.forward, factor * self.both, calls * self.forward_calls, calls * self.both_calls)


def passes_by_stage(subject: Subject, right: int, outputs: int) -> Iterator[tuple[str, Norm, Passes]]:
    """Yield what each stage takes: its name, the norm that it works in, and its passes.

    right: how many samples the model gets right (regression: how many there are).
    outputs: of the model.
    """
    settings, count = subject.settings, len(subject.samples)
    # Batches differ by little: each is one of the mean size.
    batches, each = subject.batches, right / subject.batches
    spent = 0.0
    for norm in settings.norms:
        for name, passes in _attacks(subject, norm, each, outputs):
            yield name, norm, passes.times(batches * settings.draws)
            spent += 2 * passes.samples * batches / len(settings.norms)
        radii = len(settings.grid(norm)) or _OF_A_GRID * settings.sizes.radii
        yield "average", norm, Passes(settings.average * radii).on(count / batches).times(batches)
    corrupted = Passes(len(settings.corruptions) * len(settings.severities))
    yield "corruptions", settings.norms[0], corrupted.on(count / batches).times(batches)
    if settings.diagnostics:
        yield CHECKS, settings.norms[0], _checks_of_the_model(subject, right, spent)
        for norm in settings.norms:
            yield CHECKS, norm, _checks_in(subject, norm, right, outputs, spent)


def _attacks(subject: Subject, norm: Norm, right: float, outputs: int) -> Iterator[tuple[str, Passes]]:
    """Yield what the attacks on a batch of so many samples take: the search, and a try at each radius."""
    sizes, asked = subject.settings.sizes, subject.settings.grid(norm)
    radii = len(asked) or sizes.radii
    if not subject.classifies:
        radii *= 1.0 if asked else _OF_A_GRID
        yield "confirm", Passes(4, sizes.steps * sizes.restarts).on(right).times(radii)
        return
    yield "search", _search(norm, sizes.steps, sizes.restarts).on(right)
    one = _below(norm, sizes.steps, sizes.restarts, outputs)
    # Each sample is tried below that, but where none of one or two radii lies there; of a random model at each radius.
    standing = _STANDING_ASKED if asked else 0.9 / radii if norm == "l0" else _STANDING
    tries = radii * standing if radii == 1 or subject.settings.draws > 1 else _OF_L0 if norm == "l0" else 1.0
    yield "confirm", one.on(right).times(tries, _ROUNDS * tries)


def _search(norm: Norm, steps: int, restarts: int) -> Passes:
    if norm == "l0":
        return Passes(7, steps * restarts + steps / 2)
    return Passes(20, (restarts + 1.5) * steps)


def _below(norm: Norm, steps: int, restarts: int, outputs: int) -> Passes:
    """Return what a sample takes that is tried a little below its nearest error known."""
    if norm == "l0":
        return _search(norm, steps, restarts)
    return Passes(3, steps * restarts * (1.0 if restarts < outputs else _NOT_GIVEN_UP[norm]))


def _checks_of_the_model(subject: Subject, right: int, spent: float) -> Passes:
    """Return what the checks take that are made once, whatever the norms; spent: by the attacks in a norm."""
    settings, sizes = subject.settings, subject.settings.sizes

    def of(count: int) -> int:
        return min(right, sizes.of_usual(count))

    total = Passes(4, 1).on(of(64)) + Passes(4).on(of(16)) + Passes(40 * subject.classifies).on(of(8))
    if subject.classifies and sizes.checked == 1 and "linf" not in settings.norms:
        total += _of_rival(subject, ELSEWHERE, "linf", spent)
    return total


def _checks_in(subject: Subject, norm: Norm, right: int, outputs: int, spent: float) -> Passes:
    """Return what the checks of a norm take where no probe leaves a doubt."""
    sizes = subject.settings.sizes
    steps = sizes.steps

    def of(count: int) -> int:
        return min(right, sizes.of_usual(count))

    total = Passes(65 * of(8), 2 * of(8), 5, 2) + Passes(2, 10).on(of(12))
    if not subject.classifies:
        return total + Passes(4, 4 * steps).on(of(16)) + Passes(4, steps).on(of(48))
    more, runs = longer_search(sizes)
    total += _below(norm, more, runs, outputs).on(of(6))
    for check, rival in (("gradient-masking", BLIND), ("finite-differences", DIFFERENCES), ("transfer", TRANSFER)):
        total += _of_rival(subject, rival, norm, spent) if check not in sizes.without else Passes()
    return total


def _of_rival(subject: Subject, rival: Rival, norm: Norm, spent: float) -> Passes:
    effort = rival.effort(subject.settings.sizes, norm, spent, doubt=False)
    return Passes(rival.cost(effort, norm), 0, rival.cost(effort, norm) / max(1, effort.samples), 0)
