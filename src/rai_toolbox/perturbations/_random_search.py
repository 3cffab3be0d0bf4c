"""Random search, for models with useless gradients: change a part of the point, keep changes that raise the loss.

References
----------
.. [1] M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square attack: a query-efficient black-box adversarial
   attack via random search", ECCV 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.kernels._points import is_time_to_look, unit_l2
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._problem import Best, Problem

# Of the entries, the share that a proposal changes: first, and after the share of all queries at which it halves.
_SHARE = 0.4
_HALVINGS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
# Of a proposal, in units of the radius.
_LENGTH = {"l2": 0.3, "l1": 1.0, "l0": 1.0}


def search_randomly(
    problem: Problem, ball: Ball, best: Best, rows: Tensor, *, queries: int, progress: tuple[float, float], stream: int
) -> None:
    """Go on from the best point of each row; `best` is updated with every point evaluated.

    `progress`: the share of all queries of a solve that were asked before this call, and will have been after it.
    """
    for query in range(queries):
        if is_time_to_look(query, best.achieved):
            rows = rows[~best.achieved[rows]]
            if not len(rows):
                return
        done = progress[0] + (progress[1] - progress[0]) * query / queries
        share = _SHARE * 0.5 ** sum(done >= halving for halving in _HALVINGS)
        here = ball[rows]
        x = here.land(
            here.project_(here.delta(best.x[rows]) + _proposal(problem, here, rows, share, stream + 2 * query))
        )
        best.update(rows, x, *problem.query.evaluate(x, problem.target_of(rows), beyond_rounding=True))


def _proposal(problem: Problem, ball: Ball, rows: Tensor, share: float, stream: int) -> Tensor:
    noise = problem.noise.normal(rows, stream)
    if problem.norm == "linf":
        # Across the whole ball; for data with neighbors (images), to one side.
        side = noise[:, :1] if len(problem.shape) > 2 else noise
        move = 2 * ball.epsilon * torch.where(side > 0, 1.0, -1.0)
        return torch.where(_part(problem, rows, share, stream + 1), move, 0.0).to(ball.dtype)
    move = torch.where(_part(problem, rows, share, stream + 1), noise[:, :1].sign() + 0.5 * noise, 0.0)
    size = problem.width(rows) * ball.epsilon.sqrt() if problem.norm == "l0" else ball.epsilon
    return (unit_l2(move) * size * _LENGTH[problem.norm]).to(ball.dtype)


def _part(problem: Problem, rows: Tensor, share: float, stream: int) -> Tensor:
    """Which entries a proposal changes: a window over the last two dimensions of a datum, or any if it has but one."""
    uniform = problem.noise.uniform(rows, stream)
    datum = problem.shape[1:]
    if len(datum) < 2:
        return uniform <= uniform.amin(dim=1, keepdim=True).clamp_min(share)
    height, width = datum[-2:]
    tall = min(height, max(1, round((share * height * width) ** 0.5)))
    wide = min(width, max(1, round(share * height * width / tall)))
    inside = [
        (offset := torch.arange(size, device=uniform.device) - (u * (size - length + 1)).long()[:, None]).ge(0)
        & (offset < length)
        for u, size, length in ((uniform[:, 0], height, tall), (uniform[:, -1], width, wide))
    ]
    window = inside[0][:, :, None] & inside[1][:, None, :]
    return window.flatten(1).repeat(1, datum[:-2].numel())
