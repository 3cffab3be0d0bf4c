"""The local searches for near points that change a decision: in which order they run, and where each starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses, LossOfRows
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._descent import descend, to_fewest, wide_steps
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import MOST_STEPS, Problem
from rai_toolbox.perturbations._resuming import Part
from rai_toolbox.perturbations._side_by_side import Copies
from rai_toolbox.perturbations._sparse_descent import add_greedily, exchange, put_back

_BISECTIONS = 8
# Where the random streams of `finish` begin: after those of all runs.
_END = 2**20 * MOST_STEPS
# In L0, how many walks in L1 follow those for each class, before entries are added greedily and exchanged.
_WALKS_L0 = 2
# Where the nearest point changes at most `_FEW` entries, as few others are tried: so many choices for each class.
_FEW, _RANDOM_CHOICES = 3, 4
# The share of a run's steps that the first run of a class takes.
_LOOK = {"linf": 0.6, "l2": 0.6, "l1": 0.4, "l0": 0.4}
# After which share of its steps the first run of a class is given up that has come no nearer: of the classes after the
# `_LIKELY` first ones. Those may still be the nearest, and then few steps show it.
_LIKELY, _BRIEFLY = 3, {"l2": 0.2, "l1": 0.3}
# The scale of the first step of a walk that starts from the nearest point known.
_CAREFULLY = 0.3
# The largest share of entries that a run reflects, to come to another part of the boundary, which may be nearer.
_TURNED = 0.4


# Where the first runs of several classes are made side by side, a class that has come no nearer than so many times the
# nearest point known has only half of its run.
_NEAR = 1.0
# So many runs of a datum at most are made side by side.
_SIDE_BY_SIDE = 3
# With fewer runs than these after the first of each class, all runs have the same length.
_FOR_LONG_RUNS = 4


@dataclass(frozen=True)
class _Run:
    """The plan of a run, after the first run of each class.

    `rank`: for which class, 0 the one that came nearest so far; None: for any. `radius`: of the ball around the datum
    that a random start is drawn from, in units of the nearest distance known; None: start at the nearest point known.
    `turned`: the share of that point's entries that are reflected at the datum at most, at random. `back`: how many of
    its changed entries, drawn at random, are put back. With either, a run starts there, in a ball of that radius.
    `scale`: of the first step. `sparse`: with sparse steps. `around`: with gradients at random points around while the
    ball is wide. `signs`: the share of its steps that go along signs in Linf, if there is one loss for all runs.
    `long`: how many times the usual steps it takes. `patience`: the share of them after which rows are given up that
    have not crossed the boundary.
    """

    rank: int | None = None
    radius: float | None = None
    turned: float = 0.0
    back: int = 0
    scale: float = 1.0
    sparse: bool = False
    around: bool = False
    signs: float = 1.0
    long: float = 1.0
    patience: float = 0.5


# The first run of each class.
_FIRST = _Run()
# The runs after it, in turn: from far outside for any class or for one of those that came nearest,
# and along the boundary from the nearest point known.
_LATER = (
    _Run(radius=5.0),
    _Run(rank=0, radius=3.0),
    _Run(radius=12.0),
    _Run(scale=_CAREFULLY, signs=0.5),
    _Run(rank=1, radius=3.0),
    _Run(radius=25.0),
    _Run(rank=2, radius=5.0),
    _Run(turned=_TURNED, scale=_CAREFULLY),
    _Run(radius=5.0),
    _Run(rank=0, radius=5.0),
    _Run(turned=_TURNED, scale=_CAREFULLY),
)
# In L1 a walk from far away ends at a point with few changed entries, others each time. After a few of them most fail;
# a short walk after some entries of the nearest point were put back finds a nearer one more often.
_FROM_AFAR = _Run(radius=25.0, sparse=True, around=True, long=1.5)
_NEARBY_L1 = tuple(_Run(back=back, radius=2.0, sparse=True, around=True, long=0.4, patience=0.75) for back in (1, 2, 3))
_LATER_L1 = (
    _FROM_AFAR, _Run(rank=1, radius=3.0, sparse=True, around=True), _FROM_AFAR, _FROM_AFAR, *_NEARBY_L1 * 4
)  # fmt: skip
# So in L2, after some entries were reflected.
_NEARBY_L2 = _Run(turned=0.7, radius=2.0, around=True, long=0.4, patience=0.3)
_LATER_L2 = (
    _Run(radius=5.0, around=True), _Run(rank=0, radius=3.0), _Run(rank=1, radius=3.0, around=True),
    *(_NEARBY_L2,) * 6, _Run(radius=12.0, around=True), _Run(scale=_CAREFULLY), *(_NEARBY_L2,) * 6,
)  # fmt: skip
_RUNS = {"linf": _LATER, "l2": _LATER_L2, "l1": _LATER_L1}


class _SeenIn(NearestFound):
    """The nearest points in L1, of the walks of a search in L0; each point is passed on to the nearest points in L0."""

    KEPT: ClassVar[tuple[str, ...]] = ("x", "distance")

    def __init__(self, problem: Problem, other: NearestFound) -> None:
        super().__init__(problem)
        self._other = other

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> Tensor:
        self._other.update(rows, x, score, achieved)
        return super().update(rows, x, score, achieved)


class Search:
    """The runs of one solve. Later runs of a row go towards the classes that came nearest to it.

    In L0 the first runs walk in L1: a walk in L1 from far away changes few entries.

    nearest: is given every point that the model was asked about, and keeps the nearest of each row.
    steps, restarts: the model is asked at most `steps` times `restarts` times about a row.
    limit, shape (N,): no point farther away is of interest.
    done: says of rows which need no further search.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("_spent", "_reached")

    def __init__(
        self,
        problem: Problem,
        nearest: NearestFound,
        losses: ClassLosses,
        steps: int,
        restarts: int,
        *,
        limit: Tensor | None = None,
        done: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._problem, self._nearest, self._losses = problem, nearest, losses
        self._walked, self._walks_to = problem, nearest
        if problem.norm == "l0":
            self._walked = replace(problem, norm="l1")
            self._walks_to = _SeenIn(self._walked, nearest)
        self._steps, self._restarts, self._done = steps, restarts, done
        self._limit = torch.full_like(nearest.distance, torch.inf) if limit is None else limit
        self._sweeps_all = restarts > losses.count
        walks = losses.count + min(_WALKS_L0, restarts - losses.count)
        self._walks = walks if self._sweeps_all else restarts // 2
        self._greedily = losses.count if self._sweeps_all else 1
        self._greedy = max(1, min(steps // 2, 2 * steps // self._greedily))
        self._first = max(1, round(_LOOK[problem.norm] * steps)) if self._sweeps_all else steps
        n, device = len(problem.data), problem.data.device
        self._spent = torch.zeros(n, dtype=torch.int64, device=device)
        # The distance that a run for each class reached, per row.
        self._reached = torch.full((n, losses.count), torch.inf, dtype=torch.float64, device=device)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What changes from run to run."""
        return (self,) if self._walks_to is self._nearest else (self, self._walks_to)

    @property
    def spent(self) -> Tensor:
        """The share of its evaluations that each row has used, shape (N,)."""
        return self._spent.double() / (self._steps * self._restarts)

    def count(self, rows: Tensor, questions: int) -> None:
        """Count evaluations of these rows that were made elsewhere."""
        self._spent[rows] += questions

    def can_afford(self, number: int) -> Tensor:
        """Whether each row has enough evaluations left for this run, shape (N,)."""
        return self._cost(number) <= self._left()

    def _left(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """How many evaluations each row has left."""
        return self._steps * self._restarts - self._spent[rows]

    def _cost(self, number: int) -> int:
        if self._problem.norm == "l0" and number >= self._walks:
            return self._steps if number > self._walks else self._steps // 2 + self._greedily * self._greedy
        if not self.swept(number) or self._restarts < self._losses.count + _FOR_LONG_RUNS:
            return self._steps
        return round(self._how(number).long * self._steps)

    def _how(self, number: int) -> _Run:
        if not self.swept(number):
            return _FIRST if number < _LIKELY else replace(_FIRST, patience=_BRIEFLY.get(self._problem.norm, 0.5))
        runs = _RUNS[self._walked.norm]
        return runs[(number - self._losses.count) % len(runs)]

    def swept(self, number: int) -> bool:
        """Whether every class has had a run before this one."""
        return number >= self._losses.count

    def rank(self, rows: Tensor) -> None:
        """Order the classes by the distance that a linear model predicts, the nearest first.

        Unless that takes more than a tenth of the evaluations, and the likeliest classes are not all tried anyway.
        """
        losses = self._losses
        affordable = self._sweeps_all or 10 * losses.candidates() <= self._steps * self._restarts
        if len(rows) and affordable and losses.candidates() > (1 if self._sweeps_all else losses.count):
            self._losses = losses.nearest_first(rows, self._walked.norm)
            self._spent[rows] += losses.candidates()

    def together(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """The runs in turn; those that follow each other and can be made side by side, together."""
        some: list[int] = []
        for number in numbers:
            if some and (len(some) == _SIDE_BY_SIDE or not self._alike(some[-1], number)):
                yield some
                some = []
            some.append(number)
        if some:
            yield some

    def _alike(self, one: int, other: int) -> bool:
        """Whether two runs differ at most in where they start, how wide, and for which class."""
        if self._problem.norm == "l0" or one // self._losses.count != other // self._losses.count:
            return False
        if self._problem.norm == "l1" and not self.swept(one):
            return False  # a run for a class is short if those before it came nearer
        a, b = self._how(one), self._how(other)
        if self._cost(one) != self._cost(other) or (a.rank is None) != (b.rank is None):
            return False
        same = ("scale", "sparse", "around", "signs", "patience", *(("radius",) if a.around or not a.radius else ()))
        return all(getattr(a, name) == getattr(b, name) for name in same)

    def run(self, rows: Tensor, *numbers: int) -> None:
        """Search points nearer to `rows` in one run, or in several side by side; runs count from 0.

        Side by side, no more points are worked on at once than there are data, but for those of a single datum.
        """
        if self._problem.norm == "l0" and numbers[0] >= self._walks:
            problem = self._problem.in_sweep(numbers[0] // self._losses.count)
            self._run_l0(problem, rows, numbers[0] - self._walks, numbers[0] * MOST_STEPS)
            return
        for part in rows.split(max(1, len(self._problem.data) // len(numbers))):
            self._walk(part, numbers)

    def _walk(self, rows: Tensor, numbers: Sequence[int]) -> None:
        """Make these runs, which are alike, for each of the rows."""
        losses, hows, first = self._losses, [self._how(number) for number in numbers], numbers[0]
        sweep, how, steps = first // losses.count, hows[0], self._cost(first) if self.swept(first) else self._first
        problem = self._walked.in_sweep(sweep) if sweep else self._walked
        known, most = self._known(rows), problem.farthest(rows)
        radii = [torch.minimum((each.radius or 1.0) * known, most) for each in hows] if sweep else None
        widen = [torch.full_like(known, each.radius or 1.0) for each in hows]
        copies = Copies(problem, rows, len(numbers))
        at = copies.some(self._left(rows) // self._cost(first))
        spent = self._spent if len(numbers) == 1 else torch.zeros_like(copies.rows)
        ranks, loss = self._losses_of(copies, rows, numbers, at)

        def start() -> Tensor:
            runs = zip(numbers, hows, [None] * len(numbers) if radii is None else radii, strict=True)
            return copies.of([self._start(problem, rows, each, n * MOST_STEPS, radius) for n, each, radius in runs], at)

        found = descend(
            copies.problem, copies.nearest(self._walks_to), at, start, loss,
            steps=steps, stream=first * MOST_STEPS, farthest=copies.of([most] * len(numbers), at),
            limit=copies.gathered(self._limit)[at], radius=None if radii is None else copies.of(radii, at),
            widen=copies.of(widen, at) if how.radius else None, scale=how.scale,
            sparse=how.sparse, around=wide_steps(how.radius or 1.0, steps) if how.around else 0,
            # A loss for all classes has kinks of its own, as where a target has to pass several at once.
            signs=how.signs if losses.count == 1 else 1.0, done=copies.asks(self._done), spent=spent,
            patience=max(1, int(steps * how.patience)) if self._sweeps_all else None,
            near=_NEAR if len(numbers) > 1 and not sweep else math.inf,
        )  # fmt: skip
        if len(numbers) > 1:
            self._spent[rows] += copies.each(spent, copies.rows, 0).sum(dim=0)
        for rank, reached in zip(ranks, copies.each(found, at, torch.inf), strict=True):
            if rank is not None:
                self._reached[rows, rank] = torch.minimum(self._reached[rows, rank], reached)

    def _losses_of(
        self, copies: Copies, rows: Tensor, numbers: Sequence[int], at: Tensor
    ) -> tuple[list[Tensor | None], LossOfRows]:
        """For which class each run is, (n,), None for any; and the loss of them all."""
        losses = self._losses
        ranks = [
            torch.full_like(rows, number) if not self.swept(number)
            else None if (rank := self._how(number).rank) is None else self._ranked(rows, rank)
            for number in numbers
        ]  # fmt: skip
        some = [rank for rank in ranks if rank is not None]
        return ranks, copies.losses(losses).of(at, copies.of(some, at)) if some else losses.any_class

    def _ranked(self, rows: Tensor, rank: int) -> Tensor:
        """The class that came nearest to each row, or the one after it, and so on."""
        return self._reached[rows].argsort(dim=1, stable=True)[:, rank % self._losses.count]

    def _known(self, rows: Tensor) -> Tensor:
        """As far as a point is of interest."""
        return torch.minimum(self._walks_to.distance[rows], self._limit[rows])

    def _start(self, problem: Problem, rows: Tensor, how: _Run, stream: int, radius: Tensor | None) -> Tensor:
        """Where a run starts, within this radius."""
        if radius is None:
            return problem.data[rows]
        nearest = self._walks_to
        lost = nearest.distance[rows].isinf()

        def known() -> Tensor:
            if how.back:
                return put_back(problem, nearest.x[rows], rows, how.back, stream)
            near = nearest.x[rows]
            return self._turned(problem, rows, near, how.turned, stream, radius) if how.turned else near

        from_known = how.radius is None or how.turned > 0 or how.back > 0
        if from_known and not bool(lost.any()):
            return known()
        ball = problem.ball_of(rows, radius)
        start = ball.random(lambda kind, part: getattr(problem.noise, kind)(rows[part], stream))
        return torch.where(lost[:, None], start, known()) if from_known else start

    def _turned(
        self, problem: Problem, rows: Tensor, near: Tensor, share: float, stream: int, radius: Tensor
    ) -> Tensor:
        """These points with some entries reflected at the datum: at most this share of them."""
        noise = problem.noise

        def turned(ball: Ball, part: slice) -> Tensor:
            some = noise.uniform(rows[part], stream) < share * noise.uniform(rows[part], stream + 1)[:, :1]
            return ball.project_(ball.delta(torch.where(some, 2 * ball.data - near[part], near[part])))

        return problem.ball_of(rows, radius).by_blocks(turned)

    def _run_l0(self, problem: Problem, rows: Tensor, number: int, stream: int) -> None:
        """After the walks: put back what does not matter, add entries greedily for each class, then exchange some."""
        nearest, losses, steps = self._nearest, self._losses, self._steps
        if not number:
            nearest.prune(rows, self._walks_to.x, steps // 2)
            self._spent[rows] += steps // 2
            for rank in range(self._greedily):
                add_greedily(
                    problem, nearest, rows, lambda: problem.data_of(rows), losses[rank],
                    steps=self._greedy, stream=stream + rank * steps, spent=self._spent,
                )  # fmt: skip
            return
        before = self._spent[rows]
        exchange(problem, nearest, rows, losses.any_class, steps=steps, stream=stream, spent=self._spent)
        # Runs must come to an end also where there is little to exchange.
        self._spent[rows] = torch.maximum(self._spent[rows], before + steps // 2)

    def finish(self, rows: Tensor) -> None:
        """Bring the points nearer: towards the data, along the boundary, towards the data. L0: fewer entries."""
        problem, nearest, losses, steps = self._problem, self._nearest, self._losses, self._steps
        rows = nearest.found(rows)
        if not len(rows):
            return
        if problem.norm == "l0":
            nearest.prune(rows, nearest.x, steps // 2)
            exchange(problem, nearest, rows, losses.any_class, steps=steps // 2, stream=_END, spent=self._spent)
            few = rows[nearest.distance[rows] <= _FEW]
            for number in range(min(_RANDOM_CHOICES * losses.count, steps // _FEW) if len(few) else 0):
                add_greedily(
                    problem, nearest, few, lambda: problem.data_of(few), losses[number], steps=_FEW,
                    stream=_END + (number + 1) * 4 * MOST_STEPS, spent=self._spent, randomly=True,
                )  # fmt: skip
            return
        nearest.bisect(rows, _BISECTIONS)
        linear = steps // 2 if problem.norm == "l1" else 0
        to_fewest(problem, nearest, rows, losses.any_class, steps=linear, stream=_END)
        descend(
            problem, nearest, rows, lambda: nearest.x[rows], losses.any_class, steps=3 * steps // 2 - linear,
            stream=_END + MOST_STEPS // 2, farthest=problem.farthest(rows),
            limit=self._limit[rows], radius=nearest.distance[rows], scale=_CAREFULLY, signs=0.0, done=self._done,
        )  # fmt: skip
        nearest.bisect(rows, _BISECTIONS)
