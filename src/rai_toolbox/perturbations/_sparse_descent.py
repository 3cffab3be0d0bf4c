"""The local searches of `minimum_norm` for L0: how few entries to change.

References
----------
.. [1] N. Papernot et al., "The limitations of deep learning in adversarial settings", EuroS&P 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rai_toolbox.kernels._points import by_blocks, distances, is_time_to_look, put_rows_
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem

# How many entries an exchange puts back at once: from two up to so many.
_MOST_EXCHANGED = 4
# After so many exchanges without a larger loss, the next one starts from the nearest point known.
_PATIENCE = 3


def add_greedily(
    problem: Problem,
    nearest: NearestFound,
    rows: Tensor,
    start: Callable[[], Tensor],
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    spent: Tensor,
    randomly: bool = False,
) -> None:
    """Change one more entry at each step, to its bound: that of the largest gain in a linear model of the loss.

    start: returns the first points, (n, D), which nobody else holds then.
    randomly: a random share of each gain is what counts, so that every call tries other entries.
    spent, shape (N,): counts the evaluations of each row.
    """
    x, loss_fn, base, (low, high) = start(), losses(rows), problem.data_of(rows), problem.search_range(rows)
    asked = torch.ones_like(rows)

    def moved(grad: Tensor, part: slice) -> Tensor:
        grad, here, least, most = grad[part], x[part], low[part], high[part]
        end = torch.where(grad > 0, most, least)
        worth = gain = grad * (end - here)
        if randomly:
            worth = gain * problem.noise.uniform(rows[part], stream + steps + step).to(gain.dtype)
        # To move an entry that is changed already adds no distance: all of those with a gain move, and the best other.
        changed = here != base[part]
        pick = worth.masked_fill(changed, -torch.inf).argmax(dim=1, keepdim=True)
        one_more = torch.zeros_like(changed).scatter_(1, pick, more[part, None])
        there = torch.where((changed & (gain > 0)) | one_more, end, here)
        return torch.where(going[part, None], there, here)

    for step in range(steps):
        spent.index_add_(0, rows, asked)
        answer = problem.ask(rows, x, loss_fn, stream + step)
        count = nearest.update(rows, x, answer.score, answer.achieved)
        # A row is done if its decision changed, or if it changes as many entries as are known to do. It is not changed
        # any more, and removed at the next look.
        known = nearest.distance[rows]
        going, more = (count < known) & (answer.loss <= 0), count + 1 < known
        if is_time_to_look(step, x):
            which = going.nonzero()[:, 0]
            if len(which) < len(rows):
                if not len(which):
                    return
                rows, x, going, answer.grad = rows[which], x[which], going[which], answer.grad[which]
                more, loss_fn, base, (low, high) = (
                    more[which],
                    losses(rows),
                    problem.data_of(rows),
                    problem.search_range(rows),
                )
        asked = going.to(spent.dtype)
        x = by_blocks(partial(moved, answer.grad), x)
        del answer


def exchange(
    problem: Problem,
    nearest: NearestFound,
    rows: Tensor,
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    spent: Tensor,
) -> None:
    """Put back some changed entries, drawn at random, and see whether fewer others will do.

    Others are those of the largest gains in a linear model of the loss around a random point. That starts from the
    nearest point known, and from what became of it, with one entry fewer, while the loss there still grows.
    """
    rows = nearest.found(rows)
    rows = rows[nearest.distance[rows] > 1]
    if not len(rows):
        return
    most = int(nearest.distance[rows].max())
    at, base, loss_fn, (low, high) = nearest.x[rows], problem.data_of(rows), losses(rows), problem.search_range(rows)
    loss, failed = torch.full_like(nearest.distance[rows], -torch.inf), torch.zeros_like(rows)
    every = torch.arange(len(rows), device=rows.device)

    def others(x: Tensor, grad: Tensor, number: Tensor, part: slice) -> Tensor:
        grad, here = grad[part], x[part]
        end = torch.where(grad > 0, high[part], low[part])
        gain = grad * (end - here)
        changed = here != base[part]
        # To move an entry that is changed already adds no distance.
        x = torch.where(changed & (gain > 0), end, here)
        order = gain.masked_fill_(changed, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = torch.arange(order.shape[1], device=order.device) < number[part, None]
        return x.scatter_(1, order, torch.where(chosen, end.gather(1, order), x.gather(1, order)))

    for attempt in range(max(1, steps // 2)):
        draws, known = stream + 4 * attempt, nearest.distance[rows]
        several = 2 + attempt % (_MOST_EXCHANGED - 1)
        fewer = known - distances(at, base, problem.norm)
        x = put_back(problem, at.clone(), rows, several, draws, fewer)
        number = known - 1 - distances(x, base, problem.norm)
        answer = problem.ask(rows, problem.around(rows, x, draws + 1), loss_fn, draws + 2)
        x = by_blocks(partial(others, x, answer.grad, number), x)
        score, achieved = problem.look(rows, x)
        nearest.update(rows, x, score, achieved)
        spent[rows] += 2
        nearer, again = nearest.distance[rows] < known, failed >= _PATIENCE
        moves = (score > loss) | nearer | again
        failed = torch.where(moves, 0, failed + 1)
        put_rows_((at, loss), every, moves, (x, torch.where(nearer, -torch.inf, score.double())))
        put_rows_((at,), every, failed >= _PATIENCE, (nearest.x[rows],))


def put_back(
    problem: Problem, x: Tensor, rows: Tensor, several: int, draws: int, fewer: Tensor | None = None
) -> Tensor:
    """Put back so many changed entries of points, (n, D), drawn at random, in place; `fewer`, (n,): so many less."""
    base = problem.data_of(rows)

    def drawn(part: slice) -> Tensor:
        lot = problem.noise.uniform(rows[part], draws).masked_fill_(x[part] == base[part], 2.0)
        return lot.argsort(dim=1, stable=True)[:, :several]

    order = by_blocks(drawn, x)
    back = base.gather(1, order)
    if fewer is not None:
        chosen = torch.arange(order.shape[1], device=order.device) < several - fewer[:, None]
        back = torch.where(chosen, back, x.gather(1, order))
    return x.scatter_(1, order, back)
