"""How hard the rivals try: as hard as always where a probe leaves a doubt, else as hard as a small part of the
evaluation's own cost allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rai_toolbox.robustness.attack._budget import Budget
from rai_toolbox.robustness.attack._settings import Norm

ASCENT_STEPS = 8
ELSEWHERE_STEPS = 30
#: In L1 and L0 short ascents come from outside, and go on along the boundary: how many times as long they are then.
WALKED: Mapping[Norm, float] = {"l1": 2.2, "l0": 13.0}
_SAMPLES = 16
_FEWEST = 4


@dataclass(frozen=True)
class Effort:
    """How hard a rival tries."""

    samples: int  # that it attacks; none where it is not tried
    # Of a blind search: random points, changes, and changes where it should find something.
    draws: int
    queries: int
    easy_queries: int
    directions: int = 32  # of the differences
    points: int = 2000  # that a network is distilled from
    restarts: int = 3  # of the solver in a norm that was not asked for

    @classmethod
    def usual(cls, sizes: Budget) -> Effort:
        """Return that of a whole try."""
        samples, draws, queries, easy_queries = (sizes.of_usual(count) for count in (_SAMPLES, 50, 400, 120))
        return cls(samples, draws, queries, easy_queries)

    @classmethod
    def brief(cls, sizes: Budget, samples: int) -> Effort:
        """Return that of a short try on so many samples."""
        draws, queries, easy_queries = (sizes.of_usual(count) for count in (25, 200, 60))
        return cls(samples, draws, queries, easy_queries, directions=16, points=1000, restarts=1)


@dataclass(frozen=True)
class Rival:
    """What an attack costs, in samples that go through the model forward or back."""

    share: float  # of the cost of the evaluation in a norm, what it may take where no probe leaves a doubt
    # From an effort and the norm to what it takes for each sample, and in any case.
    each: Callable[[Effort, Norm], float]
    fixed: Callable[[Effort], float] = lambda effort: 0.0

    def cost(self, effort: Effort, norm: Norm) -> float:
        """Return what an effort takes in all."""
        return self.fixed(effort) + effort.samples * self.each(effort, norm) if effort.samples else 0.0

    def effort(self, sizes: Budget, norm: Norm, spent: float, *, doubt: bool) -> Effort:
        """Return how hard to try, after an evaluation that has cost so much in the norm.

        doubt: whether a probe leaves one.
        """
        whole, room = Effort.usual(sizes), self.share * spent
        if doubt or room >= self.cost(whole, norm):
            return whole
        brief = Effort.brief(sizes, whole.samples)
        count = min(whole.samples, int((room - self.fixed(brief)) / self.each(brief, norm)))
        return Effort.brief(sizes, count if count >= _FEWEST else 0)


def _blind(effort: Effort, norm: Norm) -> float:
    return 1.0 + effort.draws + effort.queries + effort.easy_queries


def _elsewhere(effort: Effort, norm: Norm) -> float:
    return _blind(effort, norm) + 2.6 * ELSEWHERE_STEPS * (effort.restarts + 0.5)


def _differences(effort: Effort, norm: Norm) -> float:
    # Along random directions and along single entries; each question asks the model itself as well.
    return 2.0 * ASCENT_STEPS * WALKED.get(norm, 1.0) * (2 * effort.directions + 1)


def _transfer(effort: Effort, norm: Norm) -> float:
    return 40.0 * min(3.0, WALKED.get(norm, 1.0))


BLIND = Rival(0.04, _blind)
ELSEWHERE = Rival(0.03, _elsewhere)
DIFFERENCES = Rival(0.04, _differences)
TRANSFER = Rival(0.02, _transfer, lambda effort: effort.points + 64.0)
