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

from rai_toolbox.kernels._points import by_blocks, is_time_to_look, signs_of_largest
from rai_toolbox.perturbations._attack_losses import LossOfRows, linearized_distance
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._nearest_found import Nearest, NearestFound
from rai_toolbox.perturbations._problem import Problem
from rai_toolbox.perturbations._query import Answer

# Steps that aim at the linearized boundary itself may all end just short of the boundary.
OVERSHOOT = 1.01
# First and last length of a step, as a share of the radius. A step in Linf changes every entry alike.
_STEP = {"l2": (1.0, 0.005), "linf": (2.0, 0.005), "l1": (0.5, 0.005)}
_CHANGE = (0.05, 0.001)
# In L1 the radius shrinks as far as to the linearized boundary, but by no more than this share at once.
_NEARER = 0.3
# A wide ball has narrowed after 1 / this of the steps.
_NARROWING = 2.5
# Every so many steps, rows that are done are looked for and removed: each look waits for the device.
_LOOK_EVERY = 5


@dataclass
class _Walk:
    """The state of a walk, one entry per active row; `at` is its index among the rows at the start."""

    rows: Tensor
    at: Tensor
    x: Tensor
    found: Tensor
    epsilon: Tensor
    farthest: Tensor
    limit: Tensor
    widen: Tensor | None

    def keep(self, which: Tensor) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                setattr(self, field.name, value[which])


def descend(
    problem: Problem,
    nearest: Nearest,
    rows: Tensor,
    start: Callable[[], Tensor],
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    farthest: Tensor,
    limit: Tensor,
    radius: Tensor | None = None,
    widen: Tensor | None = None,
    scale: float = 1.0,
    sparse: bool = False,
    around: int = 0,
    signs: float = 1.0,
    patience: int | None = None,
    near: float = math.inf,
    done: Callable[[Tensor], Tensor] | None = None,
    spent: Tensor | None = None,
) -> Tensor:
    """Look for nearer points for `rows`; `nearest` is updated with every point evaluated.

    start: returns the first points, (n, D), which nobody else holds then.
    farthest, shape (n,): no radius is larger.
    limit, shape (n,): no point farther away is of interest.
    radius, shape (n,): the first radius. Default: as far as the linearized boundary.
    widen, shape (n,): at first a ball may reach so many times as far as points are of interest; it narrows over the
        first steps. Default: 1.
        A path to a near point often starts far away, above all where the gradient at the datum is zero or says little.
    scale: of the length of the steps.
    sparse: steps along few entries, a third as many as are changed. For L1: finds other optima than dense steps do.
    around: so many first steps take gradients at random points around.
    signs: the share of the steps that go along the signs of the gradient in Linf; later steps are in proportion to it.
        At a kink of the loss the gradients of its sides cancel out where an entry is best, their signs do not.
    patience, near: after so many steps, rows are given up that have not crossed the boundary, or only farther away than
        `near` times the nearest point known.
    done: says of rows which need no further search; asked every few steps.
    spent, shape (N,): counts the evaluations of each row of the problem.

    Returns (n,): the distance of the nearest point of this run at which the loss is positive; infinite without one.
    """
    found = torch.full_like(nearest.distance[rows], torch.inf)
    walk = _Walk(
        rows=rows, at=torch.arange(len(rows), device=rows.device), x=start(),
        found=found.clone(), epsilon=found.clone() if radius is None else radius, farthest=farthest, limit=limit,
        widen=widen,
    )  # fmt: skip
    loss_fn, balls = losses(rows), problem.ball_of(rows, walk.epsilon)
    counted, draws = 0, stream + steps
    for step in range(steps):
        leave = _leaving(walk, nearest, step, patience, near, done)
        going = walk.at if leave is None else (~leave).nonzero()[:, 0]
        if len(going) < len(walk.rows):
            found[walk.at] = walk.found
            if spent is not None:
                spent[walk.rows] += step - counted
            counted = step
            walk.keep(going)
            if not len(walk.rows):
                return found
            loss_fn, balls = losses(walk.rows), problem.ball_of(walk.rows, walk.epsilon)
        if step < around:
            answer = problem.ask(walk.rows, problem.around(walk.rows, walk.x, draws + step), loss_fn, stream + step)
            here = None
        else:
            answer = problem.ask(walk.rows, walk.x, loss_fn, stream + step)
            here = nearest.update(walk.rows, walk.x, answer.score, answer.achieved)
        proportional = problem.norm == "linf" and step >= signs * steps
        move = _sparse_move if sparse else _proportional_move if proportional else _steepest_move
        _step(problem.norm, nearest, balls, walk, answer, here, step / steps, radius is None, scale, move)
        del answer
    if spent is not None:
        spent[walk.rows] += steps - counted
    found[walk.at] = walk.found
    return found


def wide_steps(widen: float, steps: int) -> int:
    """How many steps of a walk it takes until a ball that was widened is narrow."""
    return sum(widen * (1 - _NARROWING * step / steps) > 1 for step in range(steps))


def _leaving(
    walk: _Walk, nearest: Nearest, step: int, patience: int | None, near: float,
    done: Callable[[Tensor], Tensor] | None,
) -> Tensor | None:  # fmt: skip
    if step and step == patience:
        far = walk.found.isinf() | (walk.found > near * nearest.distance[walk.rows])
        return far if done is None else far | done(walk.rows)
    return done(walk.rows) if done is not None and step and is_time_to_look(step, walk.x, _LOOK_EVERY) else None


def _step(
    norm: str, nearest: Nearest, balls: Ball, walk: _Walk, answer: Answer, here: Tensor | None, progress: float,
    guess: bool, scale: float, move: _Move,
) -> None:  # fmt: skip
    """Adapt the radius, take a step, and project on ball and box.

    `here`: the distances of the points; None if others around them were asked about.
    """
    shrink = 0.5 * (1 + math.cos(math.pi * progress))
    change = _CHANGE[1] + (_CHANGE[0] - _CHANGE[1]) * shrink
    first, last = _STEP[norm]
    epsilon = _next_radius(norm, walk, answer, here, change, guess)
    most = torch.minimum(walk.limit, nearest.distance[walk.rows])
    if walk.widen is not None and _NARROWING * progress < 1:
        most = most * (walk.widen * (1 - _NARROWING * progress)).clamp_min_(1.0)
    walk.epsilon = torch.minimum(torch.minimum(epsilon, walk.farthest), most)
    ball = balls.with_epsilon(walk.epsilon[:, None])
    length = scale * (last + (first - last) * shrink)

    def moved(ball: Ball, part: slice) -> Tensor:
        x = walk.x[part]
        return ball.project_(ball.delta(x) + move(ball, answer.grad[part], x) * (ball.radius * length))

    walk.x = ball.by_blocks(moved)


def _next_radius(
    norm: str, walk: _Walk, answer: Answer, here: Tensor | None, change: float, guess: bool
) -> Tensor:  # fmt: skip
    across, wider = answer.loss > 0, walk.epsilon * (1 + change)
    if here is not None:
        walk.found = torch.where(across, torch.minimum(walk.found, here), walk.found)
    nearer = torch.minimum(walk.found, walk.epsilon)
    if here is None or not (guess or norm == "l1"):
        return torch.where(across, nearer * (1 - change), wider)
    away = linearized_distance(answer, norm)
    if guess:
        wider = torch.where(walk.found < torch.inf, wider, here.add(away, alpha=OVERSHOOT))
    if norm == "l1":
        nearer = torch.addcmul(nearer, nearer, away.div_(here).clamp_(change, _NEARER), value=-1)
    else:
        nearer = nearer * (1 - change)
    return torch.where(across, nearer, wider)


#: The direction of a step: from the ball, the gradient and the points.
_Move = Callable[[Ball, Tensor, Tensor], Tensor]


def _steepest_move(ball: Ball, grad: Tensor, x: Tensor) -> Tensor:
    return ball.steepest(grad)


def _proportional_move(ball: Ball, grad: Tensor, x: Tensor) -> Tensor:
    # As long on average as the signs.
    grad = grad.to(ball.dtype)
    return grad / grad.abs().mean(dim=1, keepdim=True).clamp_min_(torch.finfo(grad.dtype).tiny)


def _sparse_move(ball: Ball, grad: Tensor, x: Tensor) -> Tensor:
    # Signs of the largest entries that have room, a third as many as are changed.
    changed = (x != ball.data).sum(dim=1)
    return signs_of_largest(ball.free(grad, x), ((changed + 2) // 3).clamp_min_(1))


def to_fewest(
    problem: Problem, nearest: NearestFound, rows: Tensor, losses: LossOfRows, *, steps: int, stream: int
) -> None:
    """In L1, go from the nearest point known towards the point of least norm with the same linearized loss.

    Projected gradients are slow there, where the boundary is almost parallel to a face of the ball.
    """
    rows = nearest.found(rows)
    if not len(rows):
        return
    loss_fn, base = losses(rows), problem.data_of(rows)
    low, high = problem.search_range(rows)
    x, share = nearest.x[rows], torch.ones(len(rows), 1, dtype=torch.float64, device=rows.device)
    aim = x

    def between(part: slice) -> Tensor:
        there = torch.lerp(x[part].double(), aim[part].double(), share[part]).to(x.dtype)
        return torch.minimum(torch.maximum(there, low[part]), high[part])

    def least(part: slice) -> Tensor:
        here, least, most = base[part], low[part], high[part]
        change = _least_sum(answer.grad[part], x[part] - here, least - here, most - here)
        return torch.where(nearer[part], here + change.to(x.dtype), aim[part])

    for step in range(steps):
        trial = by_blocks(between, x) if step else x
        answer = problem.ask(rows, trial, loss_fn, stream + step)
        before = nearest.distance[rows]
        nearer = ((nearest.update(rows, trial, answer.score, answer.achieved) < before) & answer.achieved)[:, None]
        nearer |= step == 0
        x = torch.where(nearer, trial, x)
        del trial
        aim = by_blocks(least, x)
        share = torch.where(nearer, (2 * share).clamp_max_(1.0), share / 3)


def _least_sum(grad: Tensor, delta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of all perturbations within [low, high] that gain what delta does, the one of the least L1 norm: a knapsack."""
    grad = grad.double()
    goal = (grad * delta.double()).sum(dim=1, keepdim=True).clamp_min_(0.0)
    worth, order = grad.abs().sort(dim=1, descending=True, stable=True)
    worth.clamp_min_(1e-300)
    room = torch.where(grad > 0, high, -low).double().gather(1, order)
    room = torch.minimum(room, goal / worth)
    gain = worth * room
    left = gain.sub_(gain.cumsum(dim=1)).add_(goal).clamp_min_(0.0)
    size = torch.minimum(left.div_(worth), room)
    return torch.zeros_like(grad).scatter_(1, order, size).mul_(grad.sign_())
