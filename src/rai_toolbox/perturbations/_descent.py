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

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import LossOfRows
from rai_toolbox.perturbations._auto_pgd import sparse_direction
from rai_toolbox.perturbations._ball import distances
from rai_toolbox.perturbations._nearest import Nearest
from rai_toolbox.perturbations._problem import Problem

# A step that aims at the linearized boundary itself stops just short of it, for ever.
OVERSHOOT = 1.01
_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}
# First and last length of a step, as a share of the radius. A step in Linf changes every entry alike.
_STEP = {"l2": (1.0, 0.005), "linf": (2.0, 0.005), "l1": (0.5, 0.005)}
_CHANGE = (0.05, 0.001)


def descend(
    problem: Problem,
    nearest: Nearest,
    rows: Tensor,
    start: Tensor,
    losses: LossOfRows,
    *,
    steps: int,
    stream: int,
    radius: Tensor | None = None,
    scale: float = 1.0,
    sparse: bool = False,
) -> Tensor:
    """Look for nearer points for `rows`; `nearest` sees every point asked about.

    Parameters
    ----------
    start : Tensor, shape (n, D)
    radius : Tensor of float64, shape (n,), optional
        The first radius. Default: as far as the linearized boundary.
    scale : float
        Of the length of the steps.
    sparse : bool
        Steps along few entries, about as many as are changed. For L1: finds other optima than dense steps do.

    Returns
    -------
    Tensor of float64, shape (n,)
        How near this run came at which the loss is positive; infinite where it never was.
    """
    loss_fn, data = losses(rows), problem.data[rows]
    around = problem.ball(nearest.distance)[rows]
    x = start
    found = torch.full_like(nearest.distance[rows], torch.inf)
    epsilon = torch.full_like(found, torch.inf) if radius is None else radius
    guessed = radius is None
    first, last = _STEP[problem.norm]
    farthest = problem.farthest(rows)
    for step in range(steps):
        shrink = 0.5 * (1 + math.cos(math.pi * step / steps))
        change = _CHANGE[1] + (_CHANGE[0] - _CHANGE[1]) * shrink
        answer = problem.ask(rows, x, loss_fn, stream + step)
        nearest.see(rows, x, answer.score, answer.achieved)
        here = distances(x, data, problem.norm)
        across = answer.loss > 0
        found = torch.where(across, torch.minimum(found, here), found)
        wider = epsilon * (1 + change)
        if guessed:
            slope = torch.linalg.vector_norm(answer.grad.double(), ord=_DUAL[problem.norm], dim=1)
            guess = here + OVERSHOOT * answer.loss.double().abs() / slope.clamp_min(1e-300)
            wider = torch.where(found.isfinite(), wider, guess)
        epsilon = torch.where(across, torch.minimum(found, epsilon) * (1 - change), wider)
        epsilon = torch.minimum(torch.minimum(epsilon, farthest), nearest.distance[rows])
        ball = around.with_epsilon(epsilon[:, None])
        length = scale * epsilon * (last + (first - last) * shrink)
        move = _sparsely(answer.grad, x != data) if sparse else ball.steepest(answer.grad)
        x = ball.land(ball.project(ball.delta(x) + move * length[:, None].to(ball.dtype)))
    return found


def _sparsely(grad: Tensor, changed: Tensor) -> Tensor:
    count = changed.sum(dim=1)
    return sparse_direction(grad, torch.where(count > 0, count / 1.5, 0.2 * grad.shape[1]).clamp_min(1.0))
