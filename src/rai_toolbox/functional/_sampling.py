"""Fill tensors with points drawn uniformly from balls."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._per_datum import checked_float, map_rows_, per_datum

Number = float | Tensor


def uniform_like_l1_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with points drawn uniformly from the L1 ball, one per datum."""

    def draw(rows: Tensor, eps: Number) -> Tensor:
        n, d = rows.shape
        # D+1 exponentials over their sum are uniform on the simplex; all but the last are uniform in the solid one.
        e = torch.empty(n, d + 1, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
        sign = torch.empty(n, d, dtype=torch.float64, device=generator.device).bernoulli_(0.5, generator=generator)
        point = e[:, :d] / e.sum(1, keepdim=True) * (2 * sign - 1)
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


def uniform_like_l2_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with points drawn uniformly from the L2 ball, one per datum."""

    def draw(rows: Tensor, eps: Number) -> Tensor:
        n, d = rows.shape
        direction = torch.empty(n, d, dtype=torch.float64, device=generator.device).normal_(generator=generator)
        u = torch.empty(n, 1, dtype=torch.float64, device=generator.device).uniform_(generator=generator)
        point = direction * (u.pow(1 / d) / torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


def uniform_like_linf_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = None,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with entries drawn uniformly from [-epsilon, epsilon]."""

    def draw(rows: Tensor, eps: Number) -> Tensor:
        point = torch.empty(rows.shape, dtype=torch.float64, device=generator.device).uniform_(
            -1, 1, generator=generator
        )
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


def _fill(draw, x: Tensor, epsilon: Number, param_ndim: int | None) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return map_rows_(draw, x, param_ndim, (per_datum("epsilon", epsilon, x, k),))


def _in_ball(point: Tensor, like: Tensor) -> Tensor:
    """Round to the dtype of `like`, towards zero, so that rounding cannot leave the ball."""
    rounded = point.to(like.dtype)
    out = rounded.to(point.dtype).abs() > point.abs()
    return torch.where(out, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
