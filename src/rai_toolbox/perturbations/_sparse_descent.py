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

from rai_toolbox.kernels._points import by_blocks, distances, is_time_to_look
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem

# How many entries an exchange puts back at once: from two up to so many.
_MOST_EXCHANGED = 4
# So many times an exchange asks about the result: as it is, and after its values have moved half-way to their bounds.
_LOOKS = 2


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
    around: int = 0,
    randomly: bool = False,
) -> None:
    """Change one more entry at each step, to its bound: that of the largest gain in a linear model of the loss.

    start: returns the first points, (n, D), which nobody else holds then.
    around: so many first steps take the gradient at a random point around. After them the changed entries move half-way
        to their bounds only.
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
        there = torch.lerp(here, end, 0.5) if 0 < around <= step else end
        there = torch.where(changed & (gain > 0), there, torch.where(one_more, end, here))
        return torch.where(going[part, None], there, here)

    for step in range(steps):
        spent.index_add_(0, rows, asked)
        asked_at = problem.around(rows, x, stream + steps + step) if step < around else x
        answer = problem.ask(rows, asked_at, loss_fn, stream + step)
        del asked_at
        if step < around:
            count = distances(x, base, problem.norm)
        else:
            count = nearest.update(rows, x, answer.score, answer.achieved)
        # A row is done if its decision changed, or if it changes as many entries as are known to do. It is not changed
        # any more, and removed at the next look.
        known = nearest.distance[rows]
        going, more = count < known, count + 1 < known
        if step >= around:
            going &= answer.loss <= 0
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
    """Put back some changed entries of the nearest point known, at random, and see whether fewer others will do."""
    left, attempt = steps, 0
    while left > 0 and len(rows):
        several, draws = 2 + attempt % (_MOST_EXCHANGED - 1), stream + 4 * steps * attempt
        length = min(left, several - 1 + _LOOKS)
        add_greedily(
            problem, nearest, rows, partial(put_back, problem, nearest, rows, several, draws), losses,
            steps=length, stream=draws + 1, spent=spent, around=several - 1,
        )  # fmt: skip
        left, attempt = left - length, attempt + 1


def put_back(problem: Problem, nearest: NearestFound, rows: Tensor, several: int, draws: int) -> Tensor:
    """Return the nearest points known with so many of their changed entries, drawn at random, as they were."""
    base, x = problem.data_of(rows), nearest.x[rows]

    def drawn(part: slice) -> Tensor:
        lot = problem.noise.uniform(rows[part], draws).masked_fill_(x[part] == base[part], 2.0)
        return lot.argsort(dim=1, stable=True)[:, :several]

    order = by_blocks(drawn, x)
    return x.scatter_(1, order, base.gather(1, order))
