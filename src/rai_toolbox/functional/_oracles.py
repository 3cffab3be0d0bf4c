"""Linear minimisation oracles: the point s of a ball at which ⟨g, s⟩ is least, per datum.

`g` is a gradient; Frank-Wolfe moves towards s. Every oracle has an in-place twin with a `scale`: it is -1 for the
optimizers, which keep the *negative* of the oracle in `param.grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._norms import normalize
from rai_toolbox.functional._per_datum import RowFunction, checked_float, map_rows, map_rows_, per_datum
from rai_toolbox.functional._selection import count_of, kept, _signed

Number = float | Tensor


def lmo_l1_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimise ⟨g, s⟩ over the L1 ball: -epsilon·sign on the one entry of largest magnitude."""
    return _oracle(map_rows, _l1_vertex, g.detach(), epsilon, param_ndim, negated=False)


def lmo_l1_ball_(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False) -> Tensor:
    """The in-place form of `lmo_l1_ball`; with `negated`, -s."""
    return _oracle(map_rows_, _l1_vertex, g, epsilon, param_ndim, negated=negated)


def lmo_l2_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimise ⟨g, s⟩ over the L2 ball: -epsilon·g/‖g‖."""
    return _oracle(map_rows, _l2_direction, g, epsilon, param_ndim, negated=False)


def lmo_l2_ball_(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False) -> Tensor:
    """The in-place form of `lmo_l2_ball`; with `negated`, -s."""
    return _oracle(map_rows_, _l2_direction, g, epsilon, param_ndim, negated=negated)


def lmo_linf_ball(g: Tensor, epsilon: Number, *, param_ndim: int | None = -1) -> Tensor:
    """Minimise ⟨g, s⟩ over the Linf ball: -epsilon·sign(g)."""
    return _oracle(map_rows, _linf_corner, g.detach(), epsilon, param_ndim, negated=False)


def lmo_linf_ball_(
    g: Tensor, epsilon: Number, *, param_ndim: int | None = -1, negated: bool = False
) -> Tensor:
    """The in-place form of `lmo_linf_ball`; with `negated`, -s."""
    return _oracle(map_rows_, _linf_corner, g, epsilon, param_ndim, negated=negated)


def lmo_l1q_ball(g: Tensor, epsilon: Number, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Spread epsilon over the k entries of largest magnitude: -epsilon/k·sign(g) there, zero elsewhere."""
    count = count_of(g, q, param_ndim)
    return _oracle(
        map_rows,
        lambda rows: _signed(rows, _kept(rows, count), 1.0),
        g.detach(),
        epsilon,
        param_ndim,
        negated=False,
    )


def lmo_l1q_ball_(
    g: Tensor, epsilon: Number, q: float, *, param_ndim: int | None = -1, negated: bool = False
) -> Tensor:
    """The in-place form of `lmo_l1q_ball`; with `negated`, -s."""
    count = count_of(g, q, param_ndim)
    return _oracle(
        map_rows_,
        lambda rows: _signed(rows, _kept(rows, count), 1.0),
        g,
        epsilon,
        param_ndim,
        negated=negated,
    )


def _oracle(
    mapper, unit: RowFunction, g: Tensor, epsilon: Number, param_ndim: int | None, *, negated: bool
) -> Tensor:
    k = datum_ndim(checked_float("g", g).ndim, param_ndim)
    sign = 1.0 if negated else -1.0

    def scaled(rows: Tensor, eps: Number) -> Tensor:
        return unit(rows) * (eps * sign)

    return mapper(scaled, g, param_ndim, (per_datum("epsilon", epsilon, g, k),))


def _l1_vertex(rows: Tensor) -> Tensor:
    a = rows.abs()
    a = torch.where(a.isnan(), a.new_full((), torch.inf), a)
    where = a.argmax(1, keepdim=True)
    value = rows.gather(1, where)
    value = torch.where(value.isnan(), value, torch.where(value < 0, -1.0, 1.0).to(value.dtype))
    unit = torch.zeros_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
    return unit.scatter(1, where, value.to(unit.dtype))


def _l2_direction(rows: Tensor) -> Tensor:
    return normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), 2, param_ndim=1, eps=0.0)


def _linf_corner(rows: Tensor) -> Tensor:
    return torch.where(rows.isnan(), rows, rows.sign()).to(torch.promote_types(rows.dtype, torch.float32))
