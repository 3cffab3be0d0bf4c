"""The smallest perturbation that changes a decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses
from rai_toolbox.perturbations._ball import check_norm
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._descent import descend
from rai_toolbox.perturbations._nearest import Nearest
from rai_toolbox.perturbations._noise import draw_seed
from rai_toolbox.perturbations._problem import (
    MOST_STEPS,
    Problem,
    as_data,
    as_target,
    cut,
    look,
    make_problem,
    positive_int,
    report,
    solving,
)
from rai_toolbox.perturbations._query import Loss
from rai_toolbox.perturbations._solution import Solution, concatenate
from rai_toolbox.perturbations._sparse_descent import add_greedily, shrink_smoothly

__all__ = ["minimum_norm"]


def minimum_norm(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: str,
    bounds: Bounds = None,
    targeted: bool = False,
    margin: Loss | None = None,
    steps: int = 50,
    restarts: int = 9,
    samples: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Solution:
    data, target = as_data(data), as_target(target, as_data(data))
    check_norm(norm)
    positive_int("steps", steps)
    positive_int("restarts", restarts)
    seed = draw_seed(generator)
    box = check_bounds(bounds, data)
    size = len(data) if batch_size is None else positive_int("batch_size", batch_size)
    parts = []
    with solving(model, None, data.device, seed):
        for begin in range(0, max(len(data), 1), max(size, 1)):
            part = slice(begin, begin + size)
            problem = make_problem(
                model, data[part], target[part], norm=norm, bounds=cut(box, part, data), targeted=targeted,
                criterion=None, margin=margin, samples=samples, seed=seed,
            )
            parts.append(_solve(problem, steps, restarts))
    return concatenate(parts)


def _solve(problem: Problem, steps: int, restarts: int) -> Solution:
    n = len(problem.data)
    nearest = Nearest(problem)
    if n:
        every = torch.arange(n, device=problem.data.device)
        _, achieved, output = look(problem)
        nearest.see(every, problem.data, achieved)
        rows = every[~achieved]
        if len(rows):
            _search(problem, nearest, rows, ClassLosses.of(problem, output), steps, restarts)
    return report(problem, nearest.x, nearest.distance.isinf())


def _search(
    problem: Problem, nearest: Nearest, rows: Tensor, losses: ClassLosses, steps: int, restarts: int
) -> None:
    sparse = problem.norm == "l0"
    for number in range(restarts):
        stream = number * MOST_STEPS
        start = problem.data[rows]
        if sparse:
            add_greedily(problem, nearest, rows, start, losses[number], steps=steps // 2, stream=stream)
            shrink_smoothly(problem, nearest, rows, start, losses[number], steps=steps, stream=stream)
        else:
            descend(problem, nearest, rows, start, losses[number], steps=steps, stream=stream)
    if sparse:
        nearest.prune(rows, steps)
    else:
        nearest.bisect(rows, 8)
