"""Projected gradient ascent that chooses its own step sizes.

References
----------
.. [1] F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
   attacks", ICML 2020.
.. [2] F. Croce, M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rai_toolbox.kernels._points import is_time_to_look, signs_of_largest
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._problem import Found, Problem
from rai_toolbox.perturbations._query import Answer, Loss

MOMENTUM = 0.75
ENOUGH_INCREASES = 0.75


@dataclass
class _State:
    """The state of a run, one entry per active row."""

    rows: Tensor
    x: Tensor
    before: Tensor | None
    """The point before it, for the momentum; None in L1, where there is none."""
    loss: Tensor
    grad: Tensor
    step: Tensor
    best_x: Tensor
    best_loss: Tensor
    best_grad: Tensor
    increases: Tensor
    checked_loss: Tensor
    reduced: Tensor
    active: Tensor
    """L1 alone: how many entries a step changes."""
    dead: Tensor
    """How often the gradient was zero."""
    nonzeros: Tensor
    """L1 alone: how many entries of the best point were changed at the last checkpoint."""

    @classmethod
    def at_start(cls, problem: Problem, ball: Ball, rows: Tensor, start: Tensor, answer: Answer) -> _State:
        """The state at the first point, before any step."""
        columns = start.shape[1]
        first = ball.epsilon * (1.0 if problem.norm == "l1" else 2.0)
        if problem.norm == "l0":
            first = 2.0 * ball.epsilon.sqrt() * problem.width(rows)
        return cls(
            rows=rows,
            x=start,
            before=None if problem.norm == "l1" else start,
            loss=answer.loss,
            grad=answer.grad,
            step=first.to(ball.dtype),
            best_x=start,
            best_loss=answer.loss,
            best_grad=answer.grad,
            increases=torch.zeros_like(rows),
            checked_loss=answer.loss,
            reduced=torch.ones_like(rows, dtype=torch.bool),
            active=torch.full_like(rows, max(1, round(0.2 * columns))),
            nonzeros=torch.full_like(rows, columns),
            dead=answer.dead.to(rows.dtype),
        )

    def move_to(self, x: Tensor, answer: Answer) -> None:
        """Take a point and the model's answer there as the current ones, and as the best where they are."""
        self.dead += answer.dead
        self.increases += answer.loss > self.loss
        self.before = None if self.before is None else self.x
        self.x, self.loss, self.grad = x, answer.loss, answer.grad
        better = answer.loss > self.best_loss
        self.best_loss = torch.where(better, answer.loss, self.best_loss)
        self.best_x = torch.where(better[:, None], x, self.best_x)
        self.best_grad = torch.where(better[:, None], answer.grad, self.best_grad)

    def keep(self, which: Tensor) -> None:
        """Drop all rows but these."""
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                setattr(self, field.name, value[which])


def checkpoints(steps: int) -> list[int]:
    """The steps after which the step size is checked: ever closer to each other."""
    previous, last, result = 0.0, 0.22, []
    while last <= 1:
        result.append(max(1, -int(-last * steps // 1)))
        previous, last = last, last + max(last - previous - 0.03, 0.06)
    return result


def auto_pgd(
    problem: Problem,
    ball: Ball,
    best: Found,
    rows: Tensor,
    start: Tensor,
    *,
    steps: int,
    losses: LossOfRows,
    stop: bool,
    stream: int,
) -> Tensor:
    """Maximize a loss over the ball for `rows`; `best` is updated with every point evaluated.

    ball: of all rows of the problem.
    rows, shape (n,)
    start, shape (n, D)
    steps: questions to the model.
    losses: what is maximized.
    stop: leave a row as it is once its decision has changed.
    stream: numbers the random draws.

    Returns (n, D): the point of the largest loss of each row, if they do not stop; of those that have not, if they do.
    """
    if not len(rows) or not steps:
        return start
    ball_here = problem.ball_of(rows, ball.epsilon[rows, 0])
    loss_fn = losses(rows)
    answer = _ask(problem, best, rows, start, loss_fn, stream)
    state = _State.at_start(problem, ball_here, rows, start, answer)
    del start, answer
    sparse = problem.norm == "l1"
    checks = set(range(k, steps, k) if sparse and (k := max(1, int(0.04 * steps))) else checkpoints(steps))
    last_check = 0
    for step in range(1, steps):
        if stop and is_time_to_look(step, best.achieved):  # those that are solved may stay a while: `best` is firm
            going = (~best.achieved[state.rows]).nonzero()[:, 0]
            if len(going) < len(state.rows):
                best.dead[state.rows] += state.dead
                state.dead.zero_()
                state.keep(going)
                if not len(state.rows):
                    return state.best_x
                ball_here, loss_fn = problem.ball_of(state.rows, ball.epsilon[state.rows, 0]), losses(state.rows)
        x = _propose(ball_here, state, problem, step)
        answer = _ask(problem, best, state.rows, x, loss_fn, stream + step)
        state.move_to(x, answer)
        del x, answer
        if step in checks:
            if sparse:
                _check_sparse(ball_here, state)
            else:
                _check(state, step - last_check)
            last_check = step
    best.dead[state.rows] += state.dead
    return state.best_x


def _ask(problem: Problem, best: Found, rows: Tensor, x: Tensor, loss_fn: Loss, stream: int) -> Answer:
    answer = problem.ask(rows, x, loss_fn, stream)
    best.update(rows, x, answer.score, answer.achieved)
    return answer


def _propose(ball: Ball, state: _State, problem: Problem, step: int) -> Tensor:
    def moved(ball: Ball, part: slice) -> Tensor:
        grad, length, delta = state.grad[part], state.step[part], ball.delta(state.x[part])
        if problem.norm == "l1":
            free = ball.free(grad, state.x[part])
            return ball.project_(delta + length * signs_of_largest(free, state.active[part]))
        aim = ball.project_(delta + length * ball.steepest(grad))
        if step > 1 and state.before is not None:
            step_back = delta - ball.delta(state.before[part])
            aim = ball.project_(delta.add(aim - delta, alpha=MOMENTUM).add(step_back, alpha=1 - MOMENTUM))
        return aim

    return ball.by_blocks(moved)


def _check(state: _State, taken: int) -> None:
    """Halve the step and go back to the best point where the loss rose too seldom, or neither step nor loss changed."""
    too_seldom = state.increases <= ENOUGH_INCREASES * taken
    stuck = ~state.reduced & (state.checked_loss >= state.best_loss)
    halve = too_seldom | stuck
    state.checked_loss = state.best_loss
    state.reduced = halve
    state.increases = torch.zeros_like(state.increases)
    state.step = torch.where(halve[:, None], state.step / 2, state.step)
    _back_to_best(state, halve)


def _check_sparse(ball: Ball, state: _State) -> None:
    """Adapt the sparsity of the steps to that of the best point; shorten the steps where it is stable."""
    nonzeros = (state.best_x != ball.data).sum(dim=1)
    sparser = nonzeros < 0.95 * state.nonzeros
    state.active = (nonzeros / 1.5).round().clamp_min(1).to(state.active.dtype)
    largest = ball.epsilon.to(ball.dtype)
    shorter = (state.step / 1.5).clamp(largest / 10, largest)
    state.step = torch.where(sparser[:, None], largest, shorter)
    state.nonzeros = nonzeros
    _back_to_best(state, sparser)


def _back_to_best(state: _State, mask: Tensor) -> None:
    column = mask[:, None]
    # In place: nobody else holds these since the last step.
    torch.where(column, state.best_x, state.x, out=state.x)
    if state.before is not None:
        torch.where(column, state.best_x, state.before, out=state.before)
    torch.where(column, state.best_grad, state.grad, out=state.grad)
    state.loss = torch.where(mask, state.best_loss, state.loss)
