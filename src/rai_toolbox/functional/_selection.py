"""Top-q: keep the entries of largest magnitude of each datum. A selection, never a sort."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._per_datum import checked_float, map_rows, map_rows_


def kept_count(numel: int, q: float) -> int:
    """How many of `numel` entries top-q keeps: `round((1 - q) * numel)`.

    Raises
    ------
    TypeError, ValueError
        `q` is not a number, or not in [0, 1].

    Examples
    --------
    >>> from rai_toolbox.functional import kept_count
    >>> kept_count(3072, 0.9)
    307
    """
    if isinstance(q, bool) or not isinstance(q, (int, float)):
        raise TypeError(f"`q` must be a number, got {q!r}")
    if not 0 <= q <= 1:
        raise ValueError(f"`q` must lie in [0, 1], got {q!r}")
    return round((1 - q) * numel)


def top_q(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Keep the entries of largest magnitude of each datum and set the others to zero.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Real floating point.
    q : float
        The quantile: of the D entries of a datum exactly `round((1 - q) * D)` are kept, those of lowest index among
        equal magnitudes. NaN counts as infinite.
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. The gradient passes through the kept entries.

    Raises
    ------
    TypeError, ValueError
        `q` is not a number in [0, 1]; `param_ndim` does not fit `x`; `x` is not real floating point.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import top_q
    >>> top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    count = _count(x, q, param_ndim)
    return map_rows(lambda rows: _masked(rows, _kept(rows.detach(), count)), x, param_ndim)


def top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1) -> Tensor:
    """Zero all but the entries of largest magnitude of each datum, in place; see `top_q`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Changed in place; any strides.
    q, param_ndim
        As for `top_q`.

    Returns
    -------
    Tensor
        `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import top_q_
    >>> top_q_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.75)
    tensor([[ 0., -3.,  0.,  0.]])
    """
    count = _count(x, q, param_ndim)
    return map_rows_(lambda rows: _masked(rows, _kept(rows, count)), x, param_ndim)


def signed_top_q(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """Top-q, then the sign, then division by the L1 norm: ±scale/k on the k kept entries that are not zero.

    The division is by the number of entries that are kept *and* not zero, so that the L1 norm of the result is `scale`
    unless the datum is zero.

    Parameters
    ----------
    x, q, param_ndim
        As for `top_q`.
    scale : float
        The L1 norm of the result.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. A kept NaN stays NaN.

    Raises
    ------
    TypeError, ValueError
        As `top_q`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import signed_top_q
    >>> signed_top_q(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5)
    tensor([[ 0.0000, -0.5000,  0.5000,  0.0000]])
    """
    count = _count(x, q, param_ndim)
    return map_rows(lambda rows: _signed(rows, _kept(rows, count), scale), x.detach(), param_ndim)


def signed_top_q_(x: Tensor, q: float, *, param_ndim: int | None = -1, scale: float = 1.0) -> Tensor:
    """The in-place form of `signed_top_q`.

    Parameters
    ----------
    x : Tensor, shape (*batch, *datum)
        Changed in place; any strides.
    q, param_ndim, scale
        As for `signed_top_q`.

    Returns
    -------
    Tensor
        `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import signed_top_q_
    >>> signed_top_q_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), q=0.5, scale=-1.0)
    tensor([[-0.0000,  0.5000, -0.5000, -0.0000]])
    """
    count = _count(x, q, param_ndim)
    return map_rows_(lambda rows: _signed(rows, _kept(rows, count), scale), x, param_ndim)


def _count(x: Tensor, q: float, param_ndim: int | None) -> int:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    return kept_count(x.shape[x.ndim - k :].numel(), q)


def _kept(rows: Tensor, count: int) -> Tensor:
    """Mask of the `count` entries of largest magnitude of each row, the first among equals."""
    if count == 0 or count == rows.shape[1]:
        return torch.full_like(rows, count > 0, dtype=torch.bool)
    a = rows.abs()
    a = torch.where(a.isnan(), a.new_full((), torch.inf), a)
    threshold = a.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    above = a > threshold
    tied = a == threshold
    room = count - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= room))


def _masked(rows: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, rows, rows.new_zeros(()))


def _signed(rows: Tensor, kept: Tensor, scale: float) -> Tensor:
    work = torch.promote_types(rows.dtype, torch.float32)
    sign = _masked(torch.where(rows.isnan(), rows, rows.sign()).to(work), kept)
    return sign * (scale / (kept & (rows != 0)).sum(1, keepdim=True).clamp_min(1))
