"""Linear minimization oracles: the point s of a ball at which ⟨g, s⟩ is least, per datum.

Frank-Wolfe moves towards s. The in-place twins take `negated`: the optimizers keep -s in `param.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._norms import normalize
from rai_toolbox.functional._per_datum import RowFunction, checked_float, map_rows, per_datum
from rai_toolbox.functional._scaling import normalize_
from rai_toolbox.functional._selection import count_of, signed_rows
from rai_toolbox.kernels._large_selection import l1_vertex_, signs_of_largest_
from rai_toolbox.kernels._machine import seen
from rai_toolbox.kernels._portable import l1_vertices
from rai_toolbox.kernels._scratch import is_large

Number: TypeAlias = float | Tensor


@documented
def lmo_l1_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimize ⟨g, s⟩ over the L1 ball: -epsilon·sign(g) on the one entry of largest magnitude.

    Returns
    -------
    Tensor
        The shape and dtype of `g`: one entry of each datum is ∓epsilon, the first among equals, the others are zero.
        Every point is a minimizer for a zero datum; its first entry gets -epsilon. NaN counts as infinite and stays
        NaN in its datum.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l1_ball
    >>> lmo_l1_ball(torch.tensor([[1.0, -3.0], [2.0, 2.0]]), epsilon=0.5)
    tensor([[ 0.0000,  0.5000],
            [-0.5000,  0.0000]])
    """
    return _oracle(_l1_vertex, g.detach(), epsilon, param_ndim, -1.0)


@twin_of(lmo_l1_ball)
def lmo_l1_ball_(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False) -> Tensor:
    """The in-place form of `lmo_l1_ball`; gives -s with `negated`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l1_ball_
    >>> lmo_l1_ball_(torch.tensor([[1.0, -3.0]]), epsilon=0.5, negated=True)
    tensor([[ 0.0000, -0.5000]])
    """
    sign = 1.0 if negated else -1.0
    k = datum_ndim(checked_float("g", g).ndim, param_ndim)
    if _by_kernels.put_l1_vertices_(g, k, per_datum("epsilon", epsilon, g, k) * sign):
        return g
    return _oracle(_l1_vertex, g, epsilon, param_ndim, sign, l1_vertex_, in_place=True)


@documented
def lmo_l2_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimize ⟨g, s⟩ over the L2 ball: -epsilon·g/‖g‖, and zero for a zero datum.

    Returns
    -------
    Tensor
        The shape and dtype of `g`; can be differentiated.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l2_ball
    >>> lmo_l2_ball(torch.tensor([[3.0, -4.0]]), epsilon=0.5)
    tensor([[-0.3000,  0.4000]])
    """
    return _oracle(_l2_direction, g, epsilon, param_ndim, -1.0)


@twin_of(lmo_l2_ball)
def lmo_l2_ball_(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False) -> Tensor:
    """The in-place form of `lmo_l2_ball`; gives -s with `negated`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l2_ball_
    >>> lmo_l2_ball_(torch.tensor([[3.0, -4.0]]), epsilon=0.5, negated=True)
    tensor([[ 0.3000, -0.4000]])
    """

    def large_(row: Tensor, scale: Number) -> Tensor:
        known = seen(lambda: float(scale), scale)
        normalize_(row, 2, param_ndim=1, eps=0.0, scale=1.0 if known is None else known)
        return row.mul_(scale) if known is None else row  # rounded twice

    return _oracle(_l2_direction, g, epsilon, param_ndim, 1.0 if negated else -1.0, large_, in_place=True)


@documented
def lmo_linf_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimize ⟨g, s⟩ over the Linf ball: -epsilon·sign(g).

    Returns
    -------
    Tensor
        The shape and dtype of `g`. The sign of NaN is that of `torch.sign`: zero.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_linf_ball
    >>> lmo_linf_ball(torch.tensor([[3.0, -4.0]]), epsilon=0.5)
    tensor([[-0.5000,  0.5000]])
    """
    return _oracle(_linf_corner, g.detach(), epsilon, param_ndim, -1.0)


@twin_of(lmo_linf_ball)
def lmo_linf_ball_(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False) -> Tensor:
    """The in-place form of `lmo_linf_ball`; gives -s with `negated`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_linf_ball_
    >>> lmo_linf_ball_(torch.tensor([[3.0, -4.0]]), epsilon=0.5, negated=True)
    tensor([[ 0.5000, -0.5000]])
    """
    sign = 1.0 if negated else -1.0
    return _oracle(
        _linf_corner, g, epsilon, param_ndim, sign, lambda row, scale: row.sign_().mul_(scale), in_place=True
    )


@documented
def lmo_l1q_ball(g: Tensor, epsilon: Number, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Spread epsilon over the entries of largest magnitude: -epsilon/k·sign(g) on k of them, zero elsewhere.

    It is the oracle of the set whose points have L1 norm ≤ epsilon and entries ≤ epsilon/k.

    Parameters
    ----------
    q : float
        In [0, 1]: k is `round((1 - q) * D)` for a datum of D entries, less those of the k that are zero.

    Returns
    -------
    Tensor
        The shape and dtype of `g`; zero for a zero datum.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l1q_ball
    >>> lmo_l1q_ball(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), epsilon=1.0, q=0.5)
    tensor([[ 0.0000,  0.5000, -0.5000,  0.0000]])
    """
    count = count_of(g, q, param_ndim)
    return _oracle(lambda rows: signed_rows(rows, count), g.detach(), epsilon, param_ndim, -1.0)


@twin_of(lmo_l1q_ball)
def lmo_l1q_ball_(
    g: Tensor, epsilon: Number, q: float, *, param_ndim: int | None = -1, negated: bool = False
) -> Tensor:
    """The in-place form of `lmo_l1q_ball`; gives -s with `negated`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_l1q_ball_
    >>> lmo_l1q_ball_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), epsilon=1.0, q=0.5, negated=True)
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    count = count_of(g, q, param_ndim)
    sign = 1.0 if negated else -1.0

    def large_(row: Tensor, scale: Number) -> Tensor:
        if count in (0, row.shape[1]):
            return row.sign_().mul_(scale / row.shape[1]) if count else row.zero_()
        return signs_of_largest_(row, count, scale)

    k = datum_ndim(g.ndim, param_ndim)
    eps = per_datum("epsilon", epsilon, g, k)
    if _by_kernels.signs_of_largest_([g], [k], [count], eps * sign):
        return g
    return _oracle(lambda rows: signed_rows(rows, count), g, epsilon, param_ndim, sign, large_, in_place=True)


def _oracle(
    unit: RowFunction,
    g: Tensor,
    epsilon: Number,
    param_ndim: int | None,
    sign: float,
    large_: Callable[[Tensor, Number], Tensor] | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Multiply `unit`, the oracle of -g in the ball of radius 1, by the radius; + 0.0 leaves no negative zero.

    `large_(row, scale)` is the same in place, by pieces.
    """
    k = datum_ndim(checked_float("g", g).ndim, param_ndim)

    def scaled(rows: Tensor, eps: Number) -> Tensor:
        if large_ is not None and is_large(rows):
            return large_(rows, eps * sign).add_(0.0)
        return unit(rows) * (eps * sign) + 0.0

    return map_rows(scaled, g, param_ndim, (per_datum("epsilon", epsilon, g, k),), in_place=in_place)


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _l1_vertex(rows: Tensor) -> Tensor:
    return l1_vertices(_wide(rows))


def _l2_direction(rows: Tensor) -> Tensor:
    return normalize(_wide(rows), 2, param_ndim=1, eps=0.0)


def _linf_corner(rows: Tensor) -> Tensor:
    return _wide(rows.sign())
