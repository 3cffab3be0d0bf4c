"""The local searches for near points that change a decision: in which order they run, and where each starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses, LossOfRows
from rai_toolbox.perturbations._descent import descend
from rai_toolbox.perturbations._nearest import Nearest
from rai_toolbox.perturbations._problem import MOST_STEPS, Problem
from rai_toolbox.perturbations._sparse_descent import add_greedily, shrink_smoothly

_BISECTIONS = 8
_RANDOM_CHOICES = 4
# Of the steps of a run, the share that a first look at a class takes; the later runs share out what this leaves.
_LOOK = 0.6
# Of the steps of a walk that starts from the nearest point known.
_CAREFULLY = 0.3


@dataclass(frozen=True)
class _Run:
    """What a run after the first of each class does.

    `rank`: for which class, 0 the one that came nearest so far; None: for any. `radius`: of the ball around the datum
    that a random start is drawn from, in units of the nearest distance known; None: start at the nearest point known.
    `kick`: how far from there toward a random point, as a share of the distance. `scale`: of the first step. `sparse`:
    L1 alone, with sparse steps.
    """

    rank: int | None = None
    radius: float | None = None
    kick: float = 0.0
    scale: float = 1.0
    sparse: bool = False


# In turn. Each kind of run was kept for what it adds where the others are stuck (bench/solvers.py).
_LATER = (
    _Run(rank=0, radius=2.0),
    _Run(scale=_CAREFULLY),
    _Run(rank=1, radius=2.0),
    _Run(rank=0, kick=0.3),
    _Run(rank=2, radius=2.0),
    _Run(scale=_CAREFULLY / 3),
    _Run(rank=0, radius=1.0),
    _Run(rank=1, kick=0.3),
    _Run(rank=3, radius=2.0),
)
_LATER_L1 = (
    _Run(),
    _Run(rank=0, radius=1.0, sparse=True),
    _Run(rank=1, radius=1.0, sparse=True),
    _Run(rank=2, radius=1.0, sparse=True),
    _Run(),
    _Run(rank=0, radius=2.0, sparse=True),
    _Run(rank=3, radius=1.0, sparse=True),
    _Run(rank=0, kick=0.3),
    _Run(),
)


class Search:
    """The runs of one solve, each row's later ones given to the classes that came nearest to it.

    Parameters
    ----------
    nearest : Nearest
        Sees every point asked about.
    steps, restarts : int
        `restarts` runs, of `steps` questions each on average.
    """

    def __init__(self, problem: Problem, nearest: Nearest, losses: ClassLosses, steps: int, restarts: int) -> None:
        self._problem, self._nearest, self._losses = problem, nearest, losses
        self._steps, self._end = steps, restarts * MOST_STEPS
        classes = losses.count
        self._first = max(1, round(_LOOK * steps)) if restarts > classes else steps
        self._later = (steps * restarts - self._first * classes) // max(1, restarts - classes)
        # How near a run for each class came to each row.
        self._reached = torch.full(
            (len(problem.data), classes), torch.inf, dtype=torch.float64, device=problem.data.device
        )

    def run(self, rows: Tensor, number: int) -> None:
        """Look for points nearer to `rows` in one run, from 0."""
        problem, losses, stream = self._problem, self._losses, number * MOST_STEPS
        sweep = number // losses.count
        if problem.norm == "l0":
            self._run_l0(problem.in_sweep(sweep), rows, losses[number], sweep, stream)
            return
        if not sweep:
            rank = torch.full_like(rows, number)
            start, radius, steps, how = problem.data[rows], None, self._first, _Run()
        else:
            runs = _LATER_L1 if problem.norm == "l1" else _LATER
            how, steps, problem = runs[(number - losses.count) % len(runs)], self._later, problem.in_sweep(sweep)
            rank = None if how.rank is None else self._ranked(rows, how.rank)
            start, radius = self._start(problem, rows, how, stream)
        loss = losses.any_class if rank is None else losses.of(rows, rank)
        found = descend(
            problem, self._nearest, rows, start, loss, steps=steps, stream=stream, radius=radius, scale=how.scale,
            sparse=how.sparse,
        )  # fmt: skip
        if rank is not None:
            self._reached[rows, rank] = torch.minimum(self._reached[rows, rank], found)

    def _ranked(self, rows: Tensor, rank: int) -> Tensor:
        """The class that came nearest to each row, or the one after it, and so on."""
        return self._reached[rows].argsort(dim=1, stable=True)[:, rank % self._losses.count]

    def _start(self, problem: Problem, rows: Tensor, how: _Run, stream: int) -> tuple[Tensor, Tensor]:
        """Where a run starts, and the radius of its first ball."""
        nearest = self._nearest
        known = nearest.distance[rows]
        radius = torch.minimum((how.radius or 1.0) * known, problem.farthest(rows))
        ball = problem.ball(nearest.distance)[rows].with_epsilon(radius[:, None])
        if how.radius is None and not how.kick and bool(known.isfinite().all()):
            return nearest.x[rows], radius
        start = ball.random(lambda kind: getattr(problem.noise, kind)(rows, stream))
        if how.radius is None:
            near = nearest.x[rows]
            kicked = ball.nearest(near + how.kick * (start - problem.data[rows])) if how.kick else near
            start = torch.where(known.isfinite()[:, None], kicked, start)
        return start, radius

    def _run_l0(self, problem: Problem, rows: Tensor, loss: LossOfRows, sweep: int, stream: int) -> None:
        nearest, steps, start = self._nearest, self._steps, problem.data[rows]
        if sweep:
            radius = torch.minimum(2 * nearest.distance[rows], problem.farthest(rows))
            ball = problem.ball(nearest.distance)[rows].with_epsilon(radius[:, None])
            start = ball.random(lambda kind: getattr(problem.noise, kind)(rows, stream))
        add_greedily(problem, nearest, rows, start, loss, steps=steps // 2, stream=stream)
        shrink_smoothly(problem, nearest, rows, start, loss, steps=steps, stream=stream + steps)

    def finish(self, rows: Tensor) -> None:
        """Bring what was found nearer: back to the data, along the boundary, and back again. L0: fewer entries."""
        problem, nearest, losses, steps = self._problem, self._nearest, self._losses, self._steps
        rows = nearest.found(rows)
        if not len(rows):
            return
        if problem.norm == "l0":
            nearest.prune(rows, steps)
            for number in range(_RANDOM_CHOICES * losses.count):
                add_greedily(
                    problem, nearest, rows, problem.data[rows], losses[number], steps=steps // 2,
                    stream=self._end + (number + 1) * 4 * steps, randomly=True,
                )  # fmt: skip
            return
        nearest.bisect(rows, _BISECTIONS)
        descend(
            problem, nearest, rows, nearest.x[rows], losses.any_class, steps=3 * steps // 2,
            stream=self._end + MOST_STEPS // 2, radius=nearest.distance[rows], scale=_CAREFULLY,
        )  # fmt: skip
        nearest.bisect(rows, _BISECTIONS)
