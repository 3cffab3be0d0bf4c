"""Euclidean projections on balls, and on their intersections with boxes, per datum.

What all have in common, whatever the dtype and the size of the entries: a point that is in the set (but for rounding of
its dtype) comes back bit for bit, so projecting twice changes nothing; infinite entries give the limit of finite ones
that grow at the same pace; NaN never leaves its datum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import datum_ndim, is_integer
from rai_toolbox.functional._nearest import Bound, Number, clip, column, nearest_in_ball, nearest_sparse
from rai_toolbox.functional._norms import scaled_norms
from rai_toolbox.functional._per_datum import checked_float, map_rows, map_rows_of_all_, per_datum
from rai_toolbox.functional._polytopes import checked_bounds
from rai_toolbox.kernels._factors import slack
from rai_toolbox.kernels._large_projection import project_large_
from rai_toolbox.kernels._machine import seen
from rai_toolbox.kernels._scratch import is_large, is_shared_out


@documented
def project_l1_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the L1 ball, or on its intersection with a box: argmin ‖z - x‖₂.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. Can be differentiated with respect to every argument.

    Raises
    ------
    ValueError
        The ball and the box have no point in common. It is seen on a CPU only: elsewhere (and under `vmap` and
        `torch.compile`) looking would wait for the device, and the result is the point of the box nearest to zero.

    References
    ----------
    .. [1] J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, "Efficient projections onto the l1-ball for learning in
       high dimensions", ICML 2008.
    .. [2] C. Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex of R^n",
       Journal of Optimization Theory and Applications 50, 1986.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l1_ball
    >>> project_l1_ball(torch.tensor([[3.0, -2.0, 0.5]]), epsilon=2.0)
    tensor([[ 1.5000, -0.5000,  0.0000]])
    >>> project_l1_ball(torch.tensor([[3.0, -2.0, 0.5]]), epsilon=2.0, upper=1.0)
    tensor([[ 1., -1.,  0.]])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, 1)


@twin_of(project_l1_ball)
def project_l1_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l1_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l1_ball_
    >>> project_l1_ball_(torch.tensor([[3.0, -2.0], [0.5, 0.25]]), epsilon=torch.tensor([2.0, 1.0]))
    tensor([[ 1.5000, -0.5000],
            [ 0.5000,  0.2500]])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, 1, in_place=True)


@documented
def project_l2_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the L2 ball, or on its intersection with a box: argmin ‖z - x‖₂.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. Can be differentiated with respect to every argument.

    Raises
    ------
    ValueError
        The ball and the box have no point in common; see `project_l1_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l2_ball
    >>> project_l2_ball(torch.tensor([[3.0, -4.0]]), epsilon=1.0)
    tensor([[ 0.6000, -0.8000]])
    >>> project_l2_ball(torch.tensor([[3.0, -4.0]]), epsilon=1.0, lower=-0.6)
    tensor([[ 0.8000, -0.6000]])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, 2)


@twin_of(project_l2_ball)
def project_l2_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l2_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l2_ball_
    >>> project_l2_ball_(torch.tensor([3e20, -4e20]), epsilon=1.0, param_ndim=1)
    tensor([ 0.6000, -0.8000])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, 2, in_place=True)


@documented
def project_linf_ball(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the Linf ball, or on its intersection with a box: a clamp.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. Can be differentiated with respect to every argument.

    Raises
    ------
    ValueError
        The ball and the box have no point in common; see `project_l1_ball`. Where it is not seen, an entry for which
        they have none takes its bound nearest to zero, and the others are clamped.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_linf_ball
    >>> project_linf_ball(torch.tensor([[3.0, -4.0]]), epsilon=1.0, lower=-0.5)
    tensor([[ 1.0000, -0.5000]])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, torch.inf)


@twin_of(project_linf_ball)
def project_linf_ball_(
    x: Tensor, epsilon: Number, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_linf_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_linf_ball_
    >>> project_linf_ball_(torch.tensor([[3.0, -0.5]]), epsilon=1.0)
    tensor([[ 1.0000, -0.5000]])
    """
    return _on_ball(x, epsilon, param_ndim, lower, upper, torch.inf, in_place=True)


@documented
def project_l0_ball(
    x: Tensor, k: int, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """Project each datum on the points with at most `k` entries that are not zero, and in a box: argmin ‖z - x‖₂.

    Parameters
    ----------
    k : int
        How many entries of a datum may differ from zero, ≥ 0.

    Returns
    -------
    Tensor
        The shape and dtype of `x`: the entries that reduce the distance most, clamped to the box, the first among
        equals. (The set is not convex: there can be other points as near.) The gradient passes through the kept ones.

    Raises
    ------
    TypeError, ValueError
        `k` is not an int, or negative; the box has no such point.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l0_ball
    >>> project_l0_ball(torch.tensor([[3.0, -2.0, 2.5]]), k=1)
    tensor([[3., 0., 0.]])
    >>> project_l0_ball(torch.tensor([[3.0, -2.0, 2.5]]), k=1, upper=0.5)
    tensor([[ 0., -2.,  0.]])
    """
    return _on_sparse(x, k, param_ndim, lower, upper)


@twin_of(project_l0_ball)
def project_l0_ball_(
    x: Tensor, k: int, *, param_ndim: int | None = -1, lower: Bound = None, upper: Bound = None
) -> Tensor:
    """The in-place form of `project_l0_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l0_ball_
    >>> project_l0_ball_(torch.tensor([[3.0, -2.0, 2.5]]), k=2)
    tensor([[3.0000, 0.0000, 2.5000]])
    """
    return _on_sparse(x, k, param_ndim, lower, upper, in_place=True)


def _on_ball(
    x: Tensor,
    epsilon: Number,
    param_ndim: int | None,
    lower: Bound,
    upper: Bound,
    p: float,
    *,
    in_place: bool = False,
) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    eps = per_datum("epsilon", epsilon, x, k)
    low, high = checked_bounds(x, lower, upper)
    if x.numel():
        seen(lambda: _check_common_point(x, k, eps, low, high, p), x)

    if p != torch.inf:
        if in_place and _by_kernels.project_(x, k, eps, low, high, int(p)):
            return x
        if not in_place and _by_kernels.has_kernels(x) and not _by_kernels.is_differentiated(x, eps, low, high):
            z = x.clone(memory_format=torch.contiguous_format)
            if _by_kernels.project_(z, k, eps, low, high, int(p)):
                return z

    def rows_function(rows: Tensor, e: Number, lo: Bound, hi: Bound) -> Tensor:
        if p == torch.inf:
            return _nearest_in_cube(rows, e, lo, hi, in_place)
        if in_place:
            return _moved_into_ball(rows, e, lo, hi, int(p))
        return nearest_in_ball(rows, e, lo, hi, int(p))

    boxed = low is not None or high is not None
    return map_rows(rows_function, x, param_ndim, (eps,), (low, high), in_place=in_place, any_order=not boxed)


def project_l1_ball_of_all_(xs: Sequence[Tensor], ks: Sequence[int], epsilon: float) -> None:
    """`project_l1_ball_` of every tensor of a list, whose last k dimensions are a datum, for one radius."""
    if not all(is_shared_out(checked_float("x", x)) for x in xs):
        for x, k in zip(xs, ks, strict=True):
            project_l1_ball_(x, epsilon, param_ndim=k)
        return
    map_rows_of_all_(lambda rows: _moved_into_ball(rows, epsilon, None, None, 1), xs, ks, any_order=True)


def _moved_into_ball(rows: Tensor, epsilon: Number, low: Bound, high: Bound, p: int) -> Tensor:
    """The nearest points of a ball of order 1 or 2 and a box, perhaps in the memory of the rows."""
    if is_large(rows) and project_large_(rows, epsilon, low, high, p):
        return rows
    return nearest_in_ball(rows, epsilon, low, high, p, in_place=True)


def _on_sparse(
    x: Tensor, k: int, param_ndim: int | None, lower: Bound, upper: Bound, *, in_place: bool = False
) -> Tensor:
    if not is_integer(k):
        raise TypeError(f"`k` must be an int, got {k!r}")
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k!r}")
    ndim = datum_ndim(checked_float("x", x).ndim, param_ndim)
    low, high = checked_bounds(x, lower, upper)
    if x.numel():
        seen(lambda: _check_sparse_point(x, ndim, k, low, high), x)
    return map_rows(
        lambda rows, lo, hi: nearest_sparse(rows, k, lo, hi), x, param_ndim, (), (low, high), in_place=in_place
    )


def _check_sparse_point(x: Tensor, ndim: int, k: int, low: Bound, high: Bound) -> None:
    needed = _least_magnitudes(x, low, high)
    if needed is None:
        return
    counts = (needed != 0).flatten(x.ndim - ndim).sum(-1) if ndim else (needed != 0).long()
    if int(counts.max()) > k:
        raise ValueError(
            f"no point of the box has only {k} entries that are not zero: `lower` and `upper` leave zero out in "
            f"{int(counts.max())} entries of datum {int(counts.argmax())}"
        )


def _nearest_in_cube(rows: Tensor, epsilon: Number, low: Bound, high: Bound, in_place: bool) -> Tensor:
    eps = epsilon.to(rows.dtype) if isinstance(epsilon, Tensor) else epsilon
    if isinstance(eps, float) and not isinstance(low, Tensor) and not isinstance(high, Tensor):
        low, high = -eps if low is None else max(low, -eps), eps if high is None else min(high, eps)
        return clip(rows, low, high, in_place=in_place)
    return clip(clip(rows, -eps, eps, in_place=in_place), low, high, in_place=in_place)


def _least_magnitudes(x: Tensor, low: Bound, high: Bound) -> Tensor | None:
    """The point of the box that is nearest to zero, or None where that is zero."""
    around_zero = (float(low.detach().amax()) if isinstance(low, Tensor) else low or 0.0) <= 0.0 and (
        float(high.detach().amin()) if isinstance(high, Tensor) else high or 0.0
    ) >= 0.0
    return None if around_zero else clip(torch.zeros_like(x), low, high)


def _check_common_point(x: Tensor, k: int, eps: Number, low: Bound, high: Bound, p: float) -> None:
    nearest = _least_magnitudes(x.detach(), low, high)
    if nearest is None:
        return
    needed = scaled_norms(nearest, k, p).unsqueeze(1)
    allowed = column(eps, needed, needed.dtype)
    relative, absolute = slack(x.dtype, max(1, x[(0,) * (x.ndim - k)].numel()), p)
    empty = (needed > allowed * (1 + relative) + absolute).nonzero()[:, 0]
    if empty.numel():
        i = int(empty[0])
        raise ValueError(
            f"the ball and the box have no point in common for {empty.numel()} of {needed.shape[0]} data, the first of "
            f"them number {i}: `lower` and `upper` allow no norm below {float(needed[i]):.6g}, `epsilon` is "
            f"{float(allowed[i]):.6g}"
        )
