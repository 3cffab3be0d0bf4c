"""The worst case within a given radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses, LossOfRows
from rai_toolbox.perturbations._auto_pgd import auto_pgd
from rai_toolbox.perturbations._ball import Ball, check_norm
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import draw_seed
from rai_toolbox.perturbations._problem import (
    MOST_STEPS,
    Best,
    Problem,
    as_data,
    as_epsilon,
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

__all__ = ["worst_case"]


def worst_case(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: str,
    epsilon: float | Tensor,
    bounds: Bounds = None,
    targeted: bool = False,
    criterion: Loss | None = None,
    margin: Loss | None = None,
    steps: int = 100,
    restarts: int = 8,
    early_stop: bool = True,
    samples: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Solution:
    data, target = as_data(data), as_target(target, as_data(data))
    check_norm(norm)
    radii = as_epsilon(epsilon, len(data), data.device, norm)
    positive_int("steps", steps)
    positive_int("restarts", restarts)
    seed = draw_seed(generator)
    box = check_bounds(bounds, data)
    size = len(data) if batch_size is None else positive_int("batch_size", batch_size)
    parts = []
    with solving(model, criterion, data.device, seed):
        for begin in range(0, max(len(data), 1), max(size, 1)):
            part = slice(begin, begin + size)
            problem = make_problem(
                model, data[part], target[part], norm=norm, bounds=cut(box, part, data), targeted=targeted,
                criterion=criterion, margin=margin, samples=samples, seed=seed,
            )
            parts.append(_solve(problem, radii[part], steps, restarts, early_stop))
    return concatenate(parts)


def _solve(problem: Problem, radii: Tensor, steps: int, restarts: int, early_stop: bool) -> Solution:
    n = len(problem.data)
    every = torch.arange(n, device=problem.data.device)
    stop = early_stop and problem.objective.achieved is not None
    best = Best(problem, by_score_alone=not stop)
    if n:
        score, achieved, output = look(problem)
        best.see(every, problem.data, score, achieved)
        ball = problem.ball(radii)
        losses = ClassLosses.of(problem, output)
        for number in range(restarts):
            rows = every[~best.achieved] if stop else every
            if not len(rows):
                break
            _run(problem, ball, best, rows, losses[number], number, steps, stop)
    return report(problem, best.x)


def _run(
    problem: Problem, ball: Ball, best: Best, rows: Tensor, losses: LossOfRows, number: int, steps: int, stop: bool
) -> None:
    stream = number * MOST_STEPS
    start = problem.data[rows]
    if number:
        start = ball[rows].random(lambda kind: getattr(problem.noise, kind)(rows, stream))
    if problem.norm != "l1":
        auto_pgd(problem, ball, best, rows, start, steps=steps, losses=losses, stop=stop, stream=stream)
        return
    # From larger balls inward: steps in the L1 ball itself cannot go far.
    nothing = Best(problem, by_score_alone=False)
    taken = 0
    for factor, part in ((3.0, int(0.3 * steps)), (2.0, int(0.3 * steps)), (1.0, steps - 2 * int(0.3 * steps))):
        wide = ball.with_epsilon(ball.epsilon * factor)
        result = auto_pgd(
            problem,
            wide,
            best if factor == 1.0 else nothing,
            rows,
            wide[rows].nearest(start),
            steps=part,
            losses=losses,
            stop=stop and factor == 1.0,
            stream=stream + taken,
        )
        start = result[rows]
        taken += part
