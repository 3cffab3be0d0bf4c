"""The smallest perturbation that changes a decision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations._auto_pgd import auto_pgd
from rai_toolbox.perturbations._ball import check_norm, distances
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import draw_seed
from rai_toolbox.perturbations._problem import (
    Best,
    Problem,
    as_data,
    as_target,
    make_problem,
    positive_int,
    report,
    solving,
)
from rai_toolbox.perturbations._query import Loss
from rai_toolbox.perturbations._solution import Solution, concatenate
from rai_toolbox.perturbations._worst_case import _cut, _look

__all__ = ["minimum_norm"]


class Nearest:
    """The nearest point found of each row that changes its decision."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.x = problem.data.clone()
        self.distance = torch.full((len(self.x),), torch.inf, dtype=torch.float64, device=self.x.device)

    def see(self, rows: Tensor, x: Tensor, achieved: Tensor) -> None:
        distance = distances(x, self._problem.data[rows], self._problem.norm)
        nearer = achieved & (distance < self.distance[rows])
        self.x[rows] = torch.where(nearer[:, None], x, self.x[rows])
        self.distance[rows] = torch.where(nearer, distance, self.distance[rows])


def minimum_norm(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: str,
    bounds: Bounds = None,
    targeted: bool = False,
    margin: Loss | None = None,
    steps: int = 300,
    samples: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
) -> Solution:
    data, target = as_data(data), as_target(target, as_data(data))
    check_norm(norm)
    positive_int("steps", steps)
    seed = draw_seed(generator)
    box = check_bounds(bounds, data)
    size = len(data) if batch_size is None else positive_int("batch_size", batch_size)
    parts = []
    with solving(model, None, data.device, seed):
        for begin in range(0, max(len(data), 1), max(size, 1)):
            part = slice(begin, begin + size)
            problem = make_problem(
                model, data[part], target[part], norm=norm, bounds=_cut(box, part, data), targeted=targeted,
                criterion=margin, margin=margin, samples=samples, seed=seed,
            )
            parts.append(_solve(problem, steps))
    return concatenate(parts)


def _solve(problem: Problem, steps: int) -> Solution:
    n = len(problem.data)
    nearest = Nearest(problem)
    if n:
        every = torch.arange(n, device=problem.data.device)
        _, achieved, _ = _look(problem)
        nearest.see(every, problem.data, achieved)
        rows = every[~achieved]
        if len(rows):
            _descend(problem, nearest, rows, steps)
            _bisect(problem, nearest, rows)
    return report(problem, nearest.x, nearest.distance.isinf())


def _descend(problem: Problem, nearest: Nearest, rows: Tensor, steps: int) -> None:
    x = problem.data[rows]
    dtype = problem.ball(nearest.distance).dtype
    dual = {"l2": 2.0, "linf": 1.0, "l1": torch.inf, "l0": torch.inf}[problem.norm]
    epsilon = torch.full((len(rows), 1), torch.inf, dtype=torch.float64, device=x.device)
    columns = x.shape[1]
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        gamma = 0.001 + (0.05 - 0.001) * cosine
        answer = problem.query.ask(x, problem.target[rows], lambda output, target: problem.objective.score(output, target))
        nearest.see(rows, x, answer.achieved)
        found = nearest.distance[rows].isfinite()[:, None]
        here = distances(x, problem.data[rows], problem.norm)[:, None]
        slope = torch.linalg.vector_norm(answer.grad.double(), ord=dual, dim=1, keepdim=True).clamp_min(1e-300)
        guess = here + 1.01 * answer.score.double().abs()[:, None] / slope
        if problem.norm == "l0":
            guess = here + 1
        epsilon = torch.where(
            answer.achieved[:, None],
            torch.minimum(nearest.distance[rows][:, None] * (1 - gamma), epsilon * (1 - gamma)),
            torch.where(found, epsilon * (1 + gamma), guess),
        )
        if problem.norm == "l0":
            epsilon = torch.where(answer.achieved[:, None], epsilon.floor().clamp(max=here - 1), epsilon.ceil())
        epsilon = torch.minimum(epsilon, nearest.distance[rows][:, None])
        ball = problem.ball(epsilon[:, 0].new_zeros(len(problem.data)))[rows].with_epsilon(epsilon)
        alpha = (epsilon if problem.norm != "l0" else ball.width() * epsilon.sqrt()) * (0.5 * cosine + 0.005)
        if problem.norm == "linf":
            alpha = alpha * columns**0.5
        grad = answer.grad / torch.linalg.vector_norm(answer.grad, dim=1, keepdim=True).clamp_min(1e-30)
        x = ball.land(ball.project((ball.delta(x) + alpha.to(dtype) * grad)))


def _bisect(problem: Problem, nearest: Nearest, rows: Tensor, steps: int = 8) -> None:
    """Back along the segment to the data, as far as the decision stays changed."""
    rows = rows[nearest.distance[rows].isfinite()]
    if problem.norm == "l0" or not len(rows):
        return
    base = problem.data[rows].double()
    delta = nearest.x[rows].double() - base
    low, high = torch.zeros(len(rows), 1, dtype=torch.float64), torch.ones(len(rows), 1, dtype=torch.float64)
    low, high = low.to(base.device), high.to(base.device)
    for _ in range(steps):
        middle = (low + high) / 2
        x = (base + middle * delta).to(problem.data.dtype)
        _, achieved = problem.query.evaluate(x, problem.target[rows])
        nearest.see(rows, x, achieved)
        high = torch.where(achieved[:, None], middle, high)
        low = torch.where(achieved[:, None], low, middle)
