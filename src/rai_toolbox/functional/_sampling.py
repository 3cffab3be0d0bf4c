"""Fill tensors with points drawn uniformly from balls."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Generator, Tensor

from rai_toolbox.functional._docs import documented
from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._per_datum import RowFunction, checked_float, map_rows_, per_datum

Number: TypeAlias = float | Tensor


@documented
def uniform_like_l1_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with points drawn uniformly from the L1 ball, one per datum.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real floating point, any strides; may be a leaf that requires a gradient.

    Returns
    -------
    Tensor
        `x`. Points are drawn in float64 and rounded towards zero, so that they lie in the ball in every dtype.

    References
    ----------
    .. [1] F. Barthe, O. Guédon, S. Mendelson, A. Naor, "A probabilistic approach to the geometry of the l_p^n-ball",
       Annals of Probability 33, 2005.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import uniform_like_l1_n_ball_
    >>> x = uniform_like_l1_n_ball_(torch.empty(5, 3, 2), epsilon=2.0)
    >>> bool((x.abs().sum((1, 2)) <= 2).all())
    True
    """

    def draw(rows: Tensor, eps: Number) -> Tensor:
        n, d = rows.shape
        # D+1 exponentials over their sum are uniform on the simplex; all but the last are uniform in the solid one.
        e = torch.empty(n, d + 1, dtype=torch.float64, device=generator.device).exponential_(generator=generator)
        sign = torch.empty(n, d, dtype=torch.float64, device=generator.device).bernoulli_(0.5, generator=generator)
        point = e[:, :d] / e.sum(1, keepdim=True) * (2 * sign - 1)
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


@documented
def uniform_like_l2_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with points drawn uniformly from the L2 ball, one per datum.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        As for `uniform_like_l1_n_ball_`.

    Returns
    -------
    Tensor
        `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import uniform_like_l2_n_ball_
    >>> x = uniform_like_l2_n_ball_(torch.empty(5, 3, 2), epsilon=2.0)
    >>> bool((x.square().sum((1, 2)) <= 4).all())
    True
    """

    def draw(rows: Tensor, eps: Number) -> Tensor:
        n, d = rows.shape
        direction = torch.empty(n, d, dtype=torch.float64, device=generator.device).normal_(generator=generator)
        u = torch.empty(n, 1, dtype=torch.float64, device=generator.device).uniform_(generator=generator)
        point = direction * (u.pow(1 / d) / torch.linalg.vector_norm(direction, dim=1, keepdim=True))
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


@documented
def uniform_like_linf_n_ball_(
    x: Tensor,
    epsilon: Number = 1.0,
    param_ndim: int | None = None,
    generator: Generator = torch.default_generator,
) -> Tensor:
    """Fill `x` in place with points drawn uniformly from the Linf ball: every entry from [-epsilon, epsilon].

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        As for `uniform_like_l1_n_ball_`.
    param_ndim : int or None
        Only says which entries share an entry of a tensor `epsilon`.

    Returns
    -------
    Tensor
        `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import uniform_like_linf_n_ball_
    >>> x = uniform_like_linf_n_ball_(torch.empty(5, 3, 2), epsilon=2.0)
    >>> bool((x.abs() <= 2).all())
    True
    """

    def draw(rows: Tensor, eps: Number) -> Tensor:
        point = torch.empty(rows.shape, dtype=torch.float64, device=generator.device).uniform_(
            -1, 1, generator=generator
        )
        return _in_ball(point.to(rows.device) * eps, rows)

    return _fill(draw, x, epsilon, param_ndim)


def _fill(draw: RowFunction, x: Tensor, epsilon: Number, param_ndim: int | None) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return map_rows_(draw, x, param_ndim, (per_datum("epsilon", epsilon, x, k),))


def _in_ball(point: Tensor, like: Tensor) -> Tensor:
    """Round to the dtype of `like`, towards zero, so that rounding cannot leave the ball."""
    rounded = point.to(like.dtype)
    out = rounded.to(point.dtype).abs() > point.abs()
    return torch.where(out, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)
