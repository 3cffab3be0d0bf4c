"""The local searches for near points that change a decision: in which order they run, and where each starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses
from rai_toolbox.perturbations._descent import descend, linearized_distance
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import MOST_STEPS, Problem
from rai_toolbox.perturbations._sparse_descent import add_greedily, exchange, shrink_smoothly

_BISECTIONS = 8
# Of the random draws of all runs, those of the last.
_END = 2**20 * MOST_STEPS
# In L0, for how many classes a first run is smooth too; and how many smooth runs from random points follow.
_SMOOTH_CLASSES, _SMOOTH_RUNS = 3, 4
# Where so few entries are changed, so many times as many as classes other few are tried, from the data on.
_FEW, _RANDOM_CHOICES = 3, 4
# Of the steps of a run, the share that a first look at a class takes.
_LOOK = 0.6
# Of the steps of a walk that starts from the nearest point known.
_CAREFULLY = 0.3


# With fewer runs than these after those of the classes, none is longer than the others.
_FOR_LONG_RUNS = 4


@dataclass(frozen=True)
class _Run:
    """The plan of a run, after the first run of each class.

    `rank`: for which class, 0 the one that came nearest so far; None: for any. `radius`: of the ball around the datum
    that a random start is drawn from, in units of the nearest distance known; None: start at the nearest point known.
    `scale`: of the first step. `sparse`: with sparse steps. `long`: how many times the usual steps it takes.
    """

    rank: int | None = None
    radius: float | None = None
    scale: float = 1.0
    sparse: bool = False
    long: float = 1.0


# In turn: from far outside for any class and for those that came nearest, and along the boundary from where that ended.
_LATER = (
    _Run(radius=5.0),
    _Run(rank=0, radius=3.0),
    _Run(radius=12.0),
    _Run(scale=_CAREFULLY),
    _Run(rank=1, radius=3.0),
    _Run(radius=25.0),
    _Run(rank=2, radius=5.0),
    _Run(scale=_CAREFULLY / 3),
    _Run(radius=5.0),
    _Run(rank=0, radius=5.0),
)
# In L1 a walk from far away ends at few entries that changed much, and other few each time.
_LATER_L1 = (
    _Run(radius=14.0, sparse=True, long=1.5),
    _Run(rank=0, radius=3.0, sparse=True),
    _Run(radius=25.0, sparse=True, long=1.5),
    _Run(),
    _Run(radius=50.0, sparse=True, long=1.5),
    _Run(rank=1, radius=8.0, sparse=True, long=1.5),
    _Run(radius=25.0, sparse=True, long=1.5),
    _Run(),
)


class Search:
    """The runs of one solve, each row's questions given to the classes that came nearest to it.

    nearest: sees every point asked about.
    steps, restarts: a row gets `steps` times `restarts` questions at most.
    limit, shape (N,): no point further off is of interest.
    done: from rows to whether they may leave.
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
        self._steps, self._restarts, self._done = steps, restarts, done
        self._limit = torch.full_like(nearest.distance, torch.inf) if limit is None else limit
        self._sweeps_all = restarts > losses.count
        self._first = max(1, round(_LOOK * steps)) if self._sweeps_all else steps
        n, device = len(problem.data), problem.data.device
        self._spent = torch.zeros(n, dtype=torch.int64, device=device)
        # The distance that a run for each class reached, per row.
        self._reached = torch.full((n, losses.count), torch.inf, dtype=torch.float64, device=device)

    @property
    def spent(self) -> Tensor:
        """Of each row, the share of its questions that were asked, shape (N,)."""
        return self._spent.double() / (self._steps * self._restarts)

    def count(self, rows: Tensor, questions: int) -> None:
        """Count evaluations of these rows that were made elsewhere."""
        self._spent[rows] += questions

    def left(self, rows: Tensor, number: int) -> Tensor:
        """Return those of `rows` with enough evaluations left for this run."""
        return rows[self._spent[rows] + self._cost(number) <= self._steps * self._restarts]

    def _cost(self, number: int) -> int:
        if not self.swept(number) or self._restarts < self._losses.count + _FOR_LONG_RUNS:
            return self._steps
        return round(self._later(number).long * self._steps)

    def _later(self, number: int) -> _Run:
        runs = _LATER_L1 if self._problem.norm == "l1" else _LATER
        return runs[(number - self._losses.count) % len(runs)]

    def swept(self, number: int) -> bool:
        """Whether every class has had a run before this one."""
        return number >= self._losses.count

    def rank(self, rows: Tensor) -> None:
        """Put the classes in the order of their distances if the model were linear: margin over the gradient's norm."""
        problem, losses = self._problem, self._losses
        if not len(rows) or not self._sweeps_all or losses.candidates() < 2 or problem.norm == "l0":
            return
        distance = torch.full((len(problem.data), losses.candidates()), torch.inf, dtype=torch.float64).to(rows.device)
        for number in range(losses.candidates()):
            loss = losses.of(rows, torch.full_like(rows, number))
            answer = problem.query.ask(problem.data[rows], problem.target_of(rows), loss(rows))
            distance[rows, number] = torch.where(answer.dead, torch.inf, linearized_distance(answer, problem.norm))
            self._spent[rows] += 1
        self._losses = losses.nearest_first(distance)

    def run(self, rows: Tensor, number: int) -> None:
        """Search points nearer to `rows` in one run; runs count from 0."""
        problem, losses, stream = self._problem, self._losses, number * MOST_STEPS
        sweep, limit = number // losses.count, self._limit[rows]
        if problem.norm == "l0":
            self._run_l0(problem.in_sweep(sweep), rows, number, stream)
            return
        if not sweep:
            rank, how, steps = torch.full_like(rows, number), _Run(), self._first
            start, radius = problem.data[rows], None
        else:
            how, steps, problem = self._later(number), self._cost(number), problem.in_sweep(sweep)
            rank = None if how.rank is None else self._ranked(rows, how.rank)
            start, radius = self._start(problem, rows, how, stream, limit)
        loss = losses.any_class if rank is None else losses.of(rows, rank)
        found = descend(
            problem, self._nearest, rows, start, loss, steps=steps, stream=stream, farthest=problem.farthest(rows),
            limit=limit, radius=radius, widen=how.radius or 1.0, scale=how.scale, sparse=how.sparse,
            done=self._done, spent=self._spent, patience=max(1, steps // 2) if self._sweeps_all else None,
        )  # fmt: skip
        if rank is not None:
            self._reached[rows, rank] = torch.minimum(self._reached[rows, rank], found)

    def _ranked(self, rows: Tensor, rank: int) -> Tensor:
        """The class that came nearest to each row, or the one after it, and so on."""
        return self._reached[rows].argsort(dim=1, stable=True)[:, rank % self._losses.count]

    def _start(self, problem: Problem, rows: Tensor, how: _Run, stream: int, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Where a run starts, and the radius of its first ball."""
        nearest = self._nearest
        known = torch.minimum(nearest.distance[rows], limit)
        radius = torch.minimum((how.radius or 1.0) * known, problem.farthest(rows))
        lost = nearest.distance[rows].isinf()
        if how.radius is None and not bool(lost.any()):
            return nearest.x[rows], radius
        ball = problem.ball(nearest.distance)[rows].with_epsilon(radius[:, None])
        start = ball.random(lambda kind: getattr(problem.noise, kind)(rows, stream))
        return (start if how.radius else torch.where(lost[:, None], start, nearest.x[rows])), radius

    def _run_l0(self, problem: Problem, rows: Tensor, number: int, stream: int) -> None:
        """For each class: add entries greedily, for the likeliest smoothly too. Then other starts, and exchanges."""
        nearest, losses, steps, start = self._nearest, self._losses, self._steps, problem.data[rows]
        later = number - losses.count
        if later < 0:
            add_greedily(
                problem, nearest, rows, start, losses[number], steps=steps // 2, stream=stream, spent=self._spent
            )
        elif later in range(0, 2 * _SMOOTH_RUNS, 2):
            radius = torch.minimum(2 * nearest.distance[rows], problem.farthest(rows))
            ball = problem.ball(nearest.distance)[rows].with_epsilon(radius[:, None])
            start = ball.random(lambda kind: getattr(problem.noise, kind)(rows, stream))
        if number < min(_SMOOTH_CLASSES, losses.count) or later in range(0, 2 * _SMOOTH_RUNS, 2):
            loss = losses[number if later < 0 else later // 2]
            shrink_smoothly(
                problem, nearest, rows, start, loss, steps=steps, stream=stream + steps, spent=self._spent
            )  # fmt: skip
        elif later >= 0:
            before = self._spent[rows]
            exchange(problem, nearest, rows, losses.any_class, steps=steps, stream=stream, spent=self._spent)
            # Where there is little to exchange, the runs shall come to an end too.
            self._spent[rows] = torch.maximum(self._spent[rows], before + steps // 2)

    def finish(self, rows: Tensor) -> None:
        """Bring the points nearer: towards the data, along the boundary, towards the data. L0: fewer entries."""
        problem, nearest, losses, steps = self._problem, self._nearest, self._losses, self._steps
        rows = nearest.found(rows)
        if not len(rows):
            return
        if problem.norm == "l0":
            nearest.prune(rows, steps)
            exchange(problem, nearest, rows, losses.any_class, steps=steps // 2, stream=_END, spent=self._spent)
            few = rows[nearest.distance[rows] <= _FEW]
            for number in range(_RANDOM_CHOICES * losses.count if len(few) else 0):
                add_greedily(
                    problem, nearest, few, problem.data_of(few), losses[number], steps=_FEW,
                    stream=_END + (number + 1) * 4 * MOST_STEPS, spent=self._spent, randomly=True,
                )  # fmt: skip
            return
        nearest.bisect(rows, _BISECTIONS)
        descend(
            problem, nearest, rows, nearest.x[rows], losses.any_class, steps=3 * steps // 2,
            stream=_END + MOST_STEPS // 2, farthest=problem.farthest(rows),
            limit=self._limit[rows], radius=nearest.distance[rows], scale=_CAREFULLY, done=self._done,
        )  # fmt: skip
        nearest.bisect(rows, _BISECTIONS)
