"""The local searches for near points that change a decision, in the order in which they are run."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses
from rai_toolbox.perturbations._descent import descend
from rai_toolbox.perturbations._nearest import Nearest
from rai_toolbox.perturbations._problem import MOST_STEPS, Problem
from rai_toolbox.perturbations._sparse_descent import add_greedily, shrink_smoothly

_BISECTIONS = 8
_RANDOM_CHOICES = 4


def search(problem: Problem, nearest: Nearest, rows: Tensor, losses: ClassLosses, number: int, steps: int) -> None:
    """Look for nearer points in one run: the number says for which loss and from where."""
    loss, stream, sweep = losses[number], number * MOST_STEPS, number // losses.count
    start, radius, problem = problem.data[rows], None, problem.in_sweep(sweep)
    if sweep:
        radius = torch.minimum(2 * nearest.distance[rows], problem.farthest(rows))
        ball = problem.ball(nearest.distance)[rows].with_epsilon(radius[:, None])
        start = ball.random(lambda kind: getattr(problem.noise, kind)(rows, stream))
    if problem.norm == "l0":
        add_greedily(problem, nearest, rows, start, loss, steps=steps // 2, stream=stream)
        shrink_smoothly(problem, nearest, rows, start, loss, steps=steps, stream=stream + steps)
    else:
        sparse = problem.norm == "l1" and sweep % 2 == 1
        descend(problem, nearest, rows, start, loss, steps=steps, stream=stream, radius=radius, sparse=sparse)


def finish(problem: Problem, nearest: Nearest, rows: Tensor, losses: ClassLosses, steps: int, stream: int) -> None:
    """Bring what was found nearer: back to the data, along the boundary, and back again. L0: with fewer entries."""
    rows = nearest.found(rows)
    if not len(rows):
        return
    if problem.norm == "l0":
        nearest.prune(rows, steps)
        for number in range(_RANDOM_CHOICES * losses.count):
            add_greedily(
                problem, nearest, rows, problem.data[rows], losses[number], steps=steps // 2,
                stream=stream + (number + 1) * 4 * steps, randomly=True,
            )  # fmt: skip
        return
    nearest.bisect(rows, _BISECTIONS)
    descend(
        problem, nearest, rows, nearest.x[rows], losses.any_class, steps=2 * steps, stream=stream + MOST_STEPS // 2,
        radius=nearest.distance[rows],
    )  # fmt: skip
    nearest.bisect(rows, _BISECTIONS)
