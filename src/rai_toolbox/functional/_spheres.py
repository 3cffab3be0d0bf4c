"""The Euclidean projection on the sphere."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._nearest import Number, slack
from rai_toolbox.functional._norms import lp_norm, normalize
from rai_toolbox.functional._per_datum import checked_float, map_rows, per_datum
from rai_toolbox.kernels._machine import wide_dtype
from rai_toolbox.kernels._scratch import is_large, pieces


@documented
def project_l2_sphere(x: Tensor, epsilon: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """Project each datum on the sphere {z : ‖z‖₂ = epsilon}: argmin ‖z - x‖₂.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. A datum on the sphere, but for rounding, comes back bit for bit. Every point of the
        sphere is as near to a zero datum: its first entry becomes epsilon. Can be differentiated.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l2_sphere
    >>> project_l2_sphere(torch.tensor([[0.3, -0.4], [0.0, 0.0]]), epsilon=2.0)
    tensor([[ 1.2000, -1.6000],
            [ 2.0000,  0.0000]])
    """
    return _on_sphere(x, epsilon, param_ndim)


@twin_of(project_l2_sphere)
def project_l2_sphere_(x: Tensor, epsilon: Number = 1.0, *, param_ndim: int | None = -1) -> Tensor:
    """The in-place form of `project_l2_sphere`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_l2_sphere_
    >>> project_l2_sphere_(torch.tensor([[0.3, -0.4]]))
    tensor([[ 0.6000, -0.8000]])
    """
    return _on_sphere(x, epsilon, param_ndim, in_place=True)


def _on_sphere(x: Tensor, epsilon: Number, param_ndim: int | None, *, in_place: bool = False) -> Tensor:
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    column = per_datum("epsilon", epsilon, x, k)
    project = functools.partial(_rows_on_sphere, in_place=in_place)
    return map_rows(project, x, param_ndim, (column,), in_place=in_place)


def _rows_on_sphere(rows: Tensor, epsilon: Number, *, in_place: bool) -> Tensor:
    if in_place and is_large(rows):
        return _large_on_sphere_(rows, epsilon)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norm = lp_norm(wide.detach(), 2, param_ndim=1, keepdim=True)
    first = torch.zeros_like(wide)
    first[:, :1] = 1
    direction = normalize(torch.where(norm == 0, first, wide), 2, param_ndim=1, eps=0.0)
    return torch.where(_is_on_sphere(norm, epsilon, rows), wide, direction * epsilon)


def _large_on_sphere_(row: Tensor, epsilon: Number) -> Tensor:
    """One datum, by pieces: no temporary is as large as the row."""
    parts = pieces(row)
    wide = wide_dtype(row)
    norms = [lp_norm(part.to(wide), 2, param_ndim=1, keepdim=True) for part in parts]
    norm = lp_norm(torch.cat(norms, 1), 2, param_ndim=1, keepdim=True)
    stays = _is_on_sphere(norm, epsilon, row) | (norm == 0)
    for part in parts:
        part.copy_(torch.where(stays, part, part.to(wide) / norm * epsilon))
    row[:, :1] = torch.where(norm == 0, epsilon, row[:, :1])
    return row


def _is_on_sphere(norm: Tensor, epsilon: Number, rows: Tensor) -> Tensor:
    relative, absolute = slack(rows.dtype, rows.shape[1], 2)
    return (norm - epsilon).abs() <= epsilon * relative + absolute
