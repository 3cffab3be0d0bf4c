"""The local searches of `minimum_norm` for L0: how few entries to change.

References
----------
.. [1] A. E. Cinà et al., "σ-zero: gradient-based optimization of l0-norm adversarial examples", ICLR 2025.
.. [2] N. Papernot et al., "The limitations of deep learning in adversarial settings", EuroS&P 2016.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rai_toolbox.kernels._points import is_time_to_look
from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import Problem

# Of the smooth count of changed entries δ² / (δ² + σ), and of the threshold below which an entry counts as unchanged;
# both in units in which an entry has room for a change of 1.
_SIGMA = 0.01
_THRESHOLD = 0.3
_THRESHOLD_RATE = 0.01
_LAST_STEP = 0.1
# How many entries an exchange puts back at once: from two up to one more than this.
_MOST_EXCHANGED = 4
_DECAY_1, _DECAY_2 = 0.9, 0.999


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
    """Change one more entry at a time, as far as it can go: that of the largest gain in a linear model of the loss.

    `randomly`: a random share of each gain is what counts, so that every call tries other entries. `spent`, (N,),
    counts the evaluations of each row.
    """
    x, loss_fn, base, (low, high) = start, losses(rows), problem.data_of(rows), problem.search_range(rows)
    asked = torch.ones_like(rows)
    for step in range(steps):
        spent.index_add_(0, rows, asked)
        answer = problem.ask(rows, x, loss_fn, stream + step)
        count = nearest.update(rows, x, answer.score, answer.achieved)
        # A row is done if its decision changed, or if it can at best equal the known distance. It stays as it is, until
        # it leaves.
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
        # Moving an entry that is changed already costs nothing; all of those move, and the best of the others.
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
    """Put back some changed entries of the nearest point known, at random, and see whether fewer others do as well."""
    rows = nearest.found(rows)
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


def shrink_smoothly(
    problem: Problem,
    nearest: NearestFound,
    rows: Tensor,
    start: Tensor,
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    spent: Tensor,
) -> None:
    """Minimize a smooth count of the changed entries, with Adam and a threshold that adapts [1]_."""
    loss_fn, base = losses(rows), problem.data_of(rows)
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    width = problem.width(rows)
    low, high = ((bound - base).to(dtype) / width for bound in problem.search_range(rows))
    delta = (start - base).to(dtype) / width
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    threshold = delta.new_full((len(rows), 1), _THRESHOLD)
    box = problem.box(rows)
    spent[rows] += steps
    for step in range(steps):
        x = box.land(delta * width)
        answer = problem.ask(rows, x, loss_fn, stream + step)
        nearest.update(rows, x, answer.score, answer.achieved)
        across = (answer.loss > 0)[:, None]
        uphill = (answer.grad * width).masked_fill_(across, 0.0)
        smooth = 2 * _SIGMA / delta.shape[1] * delta / (delta.square() + _SIGMA).square_()
        grad = smooth.sub_(uphill)
        largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=1, keepdim=True)
        grad = grad.div_(largest.clamp_min_(torch.finfo(dtype).tiny))
        mean.lerp_(grad, 1 - _DECAY_1)
        square.mul_(_DECAY_2).addcmul_(grad, grad, value=1 - _DECAY_2)
        size = _LAST_STEP + (1 - _LAST_STEP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        root = (square / (1 - _DECAY_2 ** (step + 1))).sqrt_().add_(1e-8)
        delta = delta.addcdiv(mean, root, value=-size / (1 - _DECAY_1 ** (step + 1))).clamp_(low, high)
        threshold.add_(torch.where(across, 1.0, -1.0), alpha=size * _THRESHOLD_RATE).clamp_(0, 1)
        delta = delta.masked_fill_(delta.abs() < threshold, 0.0)
