"""The local searches of `minimum_norm` for L0: how few entries to change.

References
----------
.. [1] N. Papernot et al., "The limitations of deep learning in adversarial settings", EuroS&P 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.kernels._points import is_time_to_look
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem

# How many entries an exchange puts back at once: from two up to one more than this.
_MOST_EXCHANGED = 4


def add_greedily(
    problem: Problem,
    nearest: NearestFound,
    rows: Tensor,
    start: Tensor,
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    spent: Tensor,
    randomly: bool = False,
) -> None:
    """Change one more entry at each step, to its bound: that of the largest gain in a linear model of the loss.

    `randomly`: a random share of each gain is what counts, so that every call tries other entries. `spent`, (N,),
    counts the evaluations of each row.
    """
    x, loss_fn, base, (low, high) = start, losses(rows), problem.data_of(rows), problem.search_range(rows)
    asked = torch.ones_like(rows)
    for step in range(steps):
        spent.index_add_(0, rows, asked)
        answer = problem.ask(rows, x, loss_fn, stream + step)
        count = nearest.update(rows, x, answer.score, answer.achieved)
        # A row is done if its decision changed, or if it can at best equal the known distance. It is not changed any
        # more, and removed at the next look.
        going = (answer.loss <= 0) & (count + 1 < nearest.distance[rows])
        if is_time_to_look(step, x):
            which = going.nonzero()[:, 0]
            if len(which) < len(rows):
                if not len(which):
                    return
                rows, x, going, answer.grad = rows[which], x[which], going[which], answer.grad[which]
                loss_fn, base, (low, high) = losses(rows), problem.data_of(rows), problem.search_range(rows)
        asked = going.to(spent.dtype)
        end = torch.where(answer.grad > 0, high, low)
        gain = answer.grad * (end - x)
        worth = gain * problem.noise.uniform(rows, stream + steps + step).to(gain.dtype) if randomly else gain
        # To move an entry that is changed already adds no distance: all of those with a gain move, and the best other.
        changed = x != base
        pick = worth.masked_fill(changed, -torch.inf).argmax(dim=1, keepdim=True)
        move = (changed & (gain > 0)).scatter_(1, pick, True)
        x = torch.where(move & going[:, None], end, x)


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
        several, draws = min(left, 2 + attempt % _MOST_EXCHANGED), stream + 4 * steps * attempt
        base, x = problem.data_of(rows), nearest.x[rows]
        order = torch.where(x != base, problem.noise.uniform(rows, draws), 2.0).argsort(dim=1, stable=True)
        order = order[:, :several]
        start = x.scatter(1, order, base.gather(1, order))
        add_greedily(
            problem, nearest, rows, start, losses, steps=several, stream=draws + 1, spent=spent, randomly=True
        )  # fmt: skip
        left, attempt = left - several, attempt + 1
