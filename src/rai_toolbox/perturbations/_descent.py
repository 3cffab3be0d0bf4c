"""Walk along the decision boundary toward the data: the local search of `minimum_norm` for L1, L2 and Linf.

A gradient step on the loss, then the exact projection on box ∩ ball, whose radius shrinks where the decision has
changed and grows where it has not, by ever less.

References
----------
.. [1] M. Pintor, F. Roli, W. Brendel, B. Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
   constraints", NeurIPS 2021.
.. [2] J. Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and
   defenses", CVPR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rai_toolbox.kernels._points import is_time_to_look, signs_of_largest
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem
from rai_toolbox.perturbations._query import Answer

# A step that aims at the linearized boundary itself stops just short of it, for ever.
OVERSHOOT = 1.01
_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf, "l0": math.inf}
# First and last length of a step, as a share of the radius. A step in Linf changes every entry alike.
_STEP = {"l2": (1.0, 0.005), "linf": (2.0, 0.005), "l1": (0.5, 0.005)}
_CHANGE = (0.05, 0.001)
# A wide ball has narrowed after 1 / this of the steps.
_NARROWING = 2.5
# How many steps rows that may leave stay at most: each look at them is one at the device.
_LOOK_EVERY = 5


@dataclass
class _Walk:
    """The state of a walk, one entry per active row; `at` is its index among the rows at the start."""

    rows: Tensor
    at: Tensor
    x: Tensor
    data: Tensor
    found: Tensor
    epsilon: Tensor
    farthest: Tensor
    limit: Tensor

    def keep(self, which: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[which])


def descend(
    problem: Problem,
    nearest: NearestFound,
    rows: Tensor,
    start: Tensor,
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    farthest: Tensor,
    limit: Tensor,
    radius: Tensor | None = None,
    widen: float = 1.0,
    scale: float = 1.0,
    sparse: bool = False,
    patience: int | None = None,
    done: Callable[[Tensor], Tensor] | None = None,
    spent: Tensor | None = None,
) -> Tensor:
    """Look for nearer points for `rows`; `nearest` is updated with every point evaluated.

    start, shape (n, D)
    farthest, shape (n,): no radius is larger.
    limit, shape (n,): no point further off is of interest.
    radius, shape (n,): the first radius. Default: as far as the linearized boundary.
    widen: so many times as far as is of interest a ball may reach at first; it narrows over the first steps. What leads
        to a near point often starts far away, above all where the gradient at the datum is zero or says little.
    scale: of the length of the steps.
    sparse: steps along few entries, about as many as are changed. For L1: finds other optima than dense steps do.
    patience: after so many steps a row that has not been across leaves.
    done: from rows to whether they may leave, asked every few steps.
    spent, shape (N,): counts the questions about each row of the problem.

    Returns (n,): how near this run came at which the loss is positive; infinite where it never was.
    """
    found = torch.full_like(nearest.distance[rows], torch.inf)
    walk = _Walk(
        rows=rows, at=torch.arange(len(rows), device=rows.device), x=start, data=problem.data_of(rows),
        found=found.clone(), epsilon=found.clone() if radius is None else radius, farthest=farthest, limit=limit,
    )  # fmt: skip
    loss_fn, around = losses(rows), problem.ball(nearest.distance)[rows]
    counted = 0
    for step in range(steps):
        leave = _leaving(walk, step, patience, done)
        going = walk.at if leave is None else (~leave).nonzero()[:, 0]
        if len(going) < len(walk.rows):
            found[walk.at] = walk.found
            if spent is not None:
                spent[walk.rows] += step - counted
            counted = step
            walk.keep(going)
            if not len(walk.rows):
                return found
            loss_fn, around = losses(walk.rows), problem.ball(nearest.distance)[walk.rows]
        answer = problem.ask(walk.rows, walk.x, loss_fn, stream + step)
        here = nearest.update(walk.rows, walk.x, answer.score, answer.achieved)
        wide = max(1.0, widen * (1 - _NARROWING * step / steps))
        _step(problem.norm, nearest, around, walk, answer, here, step / steps, radius is None, wide, scale, sparse)
    if spent is not None:
        spent[walk.rows] += steps - counted
    found[walk.at] = walk.found
    return found


def _leaving(walk: _Walk, step: int, patience: int | None, done: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    if step and step == patience:
        return walk.found.isinf() if done is None else walk.found.isinf() | done(walk.rows)
    return done(walk.rows) if done is not None and step and is_time_to_look(step, walk.x, _LOOK_EVERY) else None


def _step(
    norm: str, nearest: NearestFound, around: Ball, walk: _Walk, answer: Answer, here: Tensor, progress: float,
    guess: bool, wide: float, scale: float, sparse: bool,
) -> None:  # fmt: skip
    """Adapt the radius, take a step, and project on ball and box."""
    shrink = 0.5 * (1 + math.cos(math.pi * progress))
    change = _CHANGE[1] + (_CHANGE[0] - _CHANGE[1]) * shrink
    first, last = _STEP[norm]
    across = answer.loss > 0
    walk.found = torch.where(across, torch.minimum(walk.found, here), walk.found)
    wider = walk.epsilon * (1 + change)
    if guess:
        aim = here.add(linearized_distance(answer, norm), alpha=OVERSHOOT)
        wider = torch.where(walk.found < torch.inf, wider, aim)
    epsilon = torch.where(across, torch.minimum(walk.found, walk.epsilon) * (1 - change), wider)
    most = torch.minimum(walk.limit, nearest.distance[walk.rows])
    most = most if wide == 1 else most * wide
    walk.epsilon = torch.minimum(torch.minimum(epsilon, walk.farthest), most)
    ball = around.with_epsilon(walk.epsilon[:, None])
    length = scale * walk.epsilon * (last + (first - last) * shrink)
    move = _sparsely(answer.grad, walk.x != walk.data) if sparse else ball.steepest(answer.grad)
    walk.x = ball.land(ball.project_(ball.delta(walk.x) + move * length[:, None].to(ball.dtype)))


def linearized_distance(answer: Answer, norm: str) -> Tensor:
    """The distance of the boundary if the loss were linear: |loss| over the dual norm of its gradient."""
    slope = torch.linalg.vector_norm(answer.grad, ord=_DUAL[norm], dim=1, dtype=torch.float64)
    return answer.loss.abs() / slope.clamp_min_(1e-300)


def _sparsely(grad: Tensor, changed: Tensor) -> Tensor:
    count = changed.sum(dim=1)
    share = torch.where(count > 0, (count + count + 2) // 3, math.ceil(0.2 * grad.shape[1]))  # 2/3 of those, or a fifth
    return signs_of_largest(grad, share)
