"""The worst case within a given radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations import losses as L
from rai_toolbox.perturbations._auto_pgd import auto_pgd
from rai_toolbox.perturbations._ball import Ball, check_norm
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import draw_seed
from rai_toolbox.perturbations._problem import (
    Best,
    Problem,
    as_data,
    as_epsilon,
    as_target,
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
                model, data[part], target[part], norm=norm, bounds=_cut(box, part, data), targeted=targeted,
                criterion=criterion, margin=margin, samples=samples, seed=seed,
            )
            parts.append(_solve(problem, radii[part], steps, restarts, early_stop))
    return concatenate(parts)


def _cut(box: tuple[Tensor, Tensor] | None, part: slice, data: Tensor) -> Bounds:
    if box is None:
        return None
    lower, upper = (b[part] if b.ndim == data.ndim and len(b) == len(data) else b for b in box)
    return lower, upper


def _solve(problem: Problem, radii: Tensor, steps: int, restarts: int, early_stop: bool) -> Solution:
    n = len(problem.data)
    every = torch.arange(n, device=problem.data.device)
    stop = early_stop and problem.objective.achieved is not None
    best = Best(problem, by_score_alone=not stop)
    if n:
        score, achieved, output = _look(problem)
        best.see(every, problem.data, score, achieved)
        ball = problem.ball(radii)
        for number, loss_fn in zip(range(restarts), _attack_losses(problem, output), strict=False):
            rows = every[~best.achieved] if stop else every
            if not len(rows):
                break
            start = _start(problem, ball, rows, number)
            _run(problem, ball, best, rows, start, steps, loss_fn, stop)
    return report(problem, best.x)


def _look(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The data themselves: a model that is wrong already needs no perturbation."""
    with torch.no_grad():
        output = problem.query.output(problem.data)
        objective = problem.objective
        if objective.default:
            _check_labels(output, problem.target)
        score = objective.score(output, problem.target)
        if objective.achieved is None:
            achieved = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        else:
            achieved = objective.achieved(output, problem.target)
        return score.nan_to_num(nan=-torch.inf), achieved, output


def _check_labels(output: Tensor, target: Tensor) -> None:
    classes = L.as_logits(output, target).shape[1]
    if classes < 2:
        raise ValueError("the model returns no logits")
    if len(target) and not bool(((target >= 0) & (target < classes)).all()):
        raise ValueError(
            f"target must lie in [0, {classes - 1}], for the model tells {classes} classes apart; it ranges from "
            f"{int(target.min())} to {int(target.max())}"
        )


def _attack_losses(problem: Problem, output: Tensor) -> Iterator[Callable[[Tensor], Loss]]:
    """What to maximize in each restart."""
    objective = problem.objective
    if not objective.default:
        while True:
            yield lambda rows: objective.score
    sign = objective.sign

    def toward(number: int) -> Callable[[Tensor], Loss]:
        def for_rows(rows: Tensor) -> Loss:
            classes = ranked[rows, number]
            return lambda output, target: _difference(output, classes, target)

        return for_rows

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        return L.rescaled_cross_entropy(output, target) * sign

    logits = L.as_logits(output, problem.target)
    ranked = logits.scatter(1, problem.target[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
    count = logits.shape[1] - 1 if sign > 0 else 0
    while True:
        yield lambda rows: objective.score
        yield lambda rows: cross_entropy
        if count > 1:
            for number in range(count):
                yield toward(number)


def _difference(output: Tensor, classes: Tensor, target: Tensor) -> Tensor:
    logits = L.as_logits(output, target)
    return (logits.gather(1, classes[:, None]) - logits.gather(1, target[:, None]))[:, 0]


def _start(problem: Problem, ball: Ball, rows: Tensor, number: int) -> Tensor:
    if number == 0:
        return problem.data[rows]
    noise = problem.noise
    return ball[rows].random(lambda kind: getattr(noise, kind)(rows, number))


def _run(
    problem: Problem, ball: Ball, best: Best, rows: Tensor, start: Tensor, steps: int, loss_fn: Any, stop: bool
) -> None:
    if problem.norm != "l1":
        auto_pgd(problem, ball, best, rows, start, steps=steps, loss_fn=loss_fn, stop=stop)
        return
    # From larger balls inward: steps in the L1 ball itself cannot go far.
    seen = 0
    nothing = Best(problem, by_score_alone=False)
    for factor, share in ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4)):
        part = steps - seen if factor == 1.0 else int(share * steps)
        seen += part
        wide = ball.with_epsilon(ball.epsilon * factor)
        start = wide[rows].nearest(start)
        result = auto_pgd(
            problem, wide, best if factor == 1.0 else nothing, rows, start, steps=part, loss_fn=loss_fn,
            stop=stop and factor == 1.0,
        )
        start = result[rows]
