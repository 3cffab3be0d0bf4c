"""Functions of the singular values of matrices: the polar factor, the spectral ball, and its oracle.

A datum of shape (d0, d1, ...) is the matrix (d0, d1·...); `row_blocks` cuts it into as many matrices of d0 / row_blocks
rows. `_singular_values.py` holds the numerics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional._docs import documented, twin_of
from rai_toolbox.functional._layout import blocks, datum_ndim, write_through
from rai_toolbox.functional._per_datum import WORK_NUMEL, checked_float, per_datum
from rai_toolbox.functional._singular_values import newton_schulz, of_singular_values, shares_calls
from rai_toolbox.kernels._machine import is_on_cpu
from rai_toolbox.kernels._threads import share_out

Number = float | Tensor


@documented
def polar(x: Tensor, *, param_ndim: int | None = 2, steps: int | None = None, row_blocks: int = 1) -> Tensor:
    """Replace each matrix by its orthogonal polar factor: A = U Σ Vᵀ becomes U Vᵀ.

    It is the nearest matrix with orthonormal rows (or columns, whichever are fewer).

    Parameters
    ----------
    x : Tensor, shape (*batch, d0, ...)
        Real floating point. A datum is the matrix (d0, all that follows).
    param_ndim : int or None
        The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`. 2: stacks of matrices; None: the
        whole tensor, such as the weight of a convolution.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. Zero for a zero matrix; for a matrix without full rank the partial isometry, whose
        rank is that of the matrix. A matrix with an entry that is not finite becomes NaN. The exact factor can be
        differentiated.

    References
    ----------
    .. [1] N. J. Higham, "Functions of Matrices: Theory and Computation", SIAM 2008, chapter 8.
    .. [2] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import polar
    >>> polar(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    check_spectral_options(steps, row_blocks)
    if steps is not None:
        return _map_matrices(lambda a: newton_schulz(a, steps), x.detach(), param_ndim, row_blocks)
    return _map_matrices(lambda a: of_singular_values(a, None), x, param_ndim, row_blocks)


@twin_of(polar)
def polar_(x: Tensor, *, param_ndim: int | None = 2, steps: int | None = None, row_blocks: int = 1) -> Tensor:
    """The in-place form of `polar`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import polar_
    >>> polar_(torch.tensor([[0.0, -3.0], [0.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 0.,  0.]])
    """
    check_spectral_options(steps, row_blocks)
    polar_of_all_([x], [datum_ndim(checked_float("x", x).ndim, param_ndim)], steps, row_blocks)
    return x


@documented
def lmo_spectral_ball(
    g: Tensor, epsilon: Number, *, param_ndim: int | None = 2, steps: int | None = None, row_blocks: int = 1
) -> Tensor:
    """Minimize ⟨g, s⟩ over the ball of matrices whose singular values are at most epsilon: -epsilon·polar(g).

    Parameters
    ----------
    g : Tensor, shape (*batch, d0, ...)
        Real floating point.
    param_ndim : int or None
        2: stacks of matrices; None: the whole tensor, such as the weight of a convolution.

    Returns
    -------
    Tensor
        The shape and dtype of `g`. With `steps` the point may lie outside the ball, by a fifth of `epsilon`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_spectral_ball
    >>> lmo_spectral_ball(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), epsilon=0.5)
    tensor([[-0.5000,  0.0000],
            [ 0.0000,  0.5000]])
    """
    radius = _radius(epsilon, g, param_ndim)
    return polar(g, param_ndim=param_ndim, steps=steps, row_blocks=row_blocks) * -radius + 0.0


@twin_of(lmo_spectral_ball)
def lmo_spectral_ball_(
    g: Tensor,
    epsilon: Number,
    *,
    param_ndim: int | None = 2,
    steps: int | None = None,
    row_blocks: int = 1,
    negated: bool = False,
) -> Tensor:
    """The in-place form of `lmo_spectral_ball`; gives -s with `negated`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import lmo_spectral_ball_
    >>> lmo_spectral_ball_(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), epsilon=0.5, negated=True)
    tensor([[ 0.5000,  0.0000],
            [ 0.0000, -0.5000]])
    """
    radius = _radius(epsilon, g, param_ndim)
    with torch.no_grad():
        polar_(g, param_ndim=param_ndim, steps=steps, row_blocks=row_blocks)
        return g.mul_(radius if negated else -radius).add_(0.0)


@documented
def project_spectral_ball(x: Tensor, epsilon: Number, *, param_ndim: int | None = 2, row_blocks: int = 1) -> Tensor:
    """Project each matrix on the spectral ball {z : σ(z) ≤ epsilon}: argmin ‖z - x‖₂ clips the singular values.

    Parameters
    ----------
    x : Tensor, shape (*batch, d0, ...)
        Real floating point. A datum is the matrix (d0, all that follows).
    param_ndim : int or None
        2: stacks of matrices; None: the whole tensor, such as the weight of a convolution.

    Returns
    -------
    Tensor
        The shape and dtype of `x`. A matrix inside comes back bit for bit; one with an entry that is not finite
        becomes NaN. Can be differentiated by `x` and by `epsilon`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_spectral_ball
    >>> project_spectral_ball(torch.tensor([[0.0, -3.0], [0.5, 0.0]]), epsilon=1.0)
    tensor([[ 0.0000, -1.0000],
            [ 0.5000,  0.0000]])
    """
    check_spectral_options(None, row_blocks)
    radius = per_datum("epsilon", epsilon, checked_float("x", x), datum_ndim(x.ndim, param_ndim))
    return _map_matrices(of_singular_values, x, param_ndim, row_blocks, radius)


@twin_of(project_spectral_ball)
def project_spectral_ball_(x: Tensor, epsilon: Number, *, param_ndim: int | None = 2, row_blocks: int = 1) -> Tensor:
    """The in-place form of `project_spectral_ball`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import project_spectral_ball_
    >>> project_spectral_ball_(torch.tensor([[0.0, -3.0], [0.5, 0.0]]), epsilon=1.0)
    tensor([[ 0.0000, -1.0000],
            [ 0.5000,  0.0000]])
    """
    check_spectral_options(None, row_blocks)
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    radius = per_datum("epsilon", epsilon, x, k)
    with torch.no_grad():
        row = 0
        for block in blocks(write_through(x), k, WORK_NUMEL):
            count = math.prod(block.shape[: block.ndim - k])
            part = radius[row : row + count] if isinstance(radius, Tensor) else radius
            block.copy_(_map_matrices(of_singular_values, block, k, row_blocks, part))
            row += count
    return x


def check_spectral_options(steps: object, row_blocks: object) -> None:
    """Raise unless `steps` is None or an int ≥ 1, and `row_blocks` an int ≥ 1."""
    for name, value in (("steps", steps), ("row_blocks", row_blocks)):
        if name == "steps" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an int{' or None' * (name == 'steps')}, got {value!r}")
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


def matrix_shape(shape: Sequence[int], k: int, row_blocks: int) -> tuple[int, int]:
    """The shape of the matrices that the last `k` dimensions of `shape` make.

    An entry by itself is a matrix.

    Raises ValueError: `row_blocks` does not divide the rows.
    """
    if k == 0:
        shape, k = (1,), 1
    rows = shape[len(shape) - k]
    if rows % row_blocks:
        raise ValueError(
            f"`row_blocks` is {row_blocks}, which does not divide the {rows} rows of a datum of {tuple(shape)}"
        )
    return rows // row_blocks, math.prod(shape[len(shape) - k + 1 :])


@torch.no_grad()
def polar_of_all_(xs: Sequence[Tensor], ks: Sequence[int], steps: int | None, row_blocks: int) -> None:
    """`polar_` of a list of tensors whose last `k` dimensions are a datum; matrices of one shape share their calls."""
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for x, k in zip(xs, ks, strict=True):
        shape = matrix_shape(x.shape, k, row_blocks)
        if x.numel() == 0:
            continue
        for block in blocks(write_through(x), k, WORK_NUMEL):
            alike.setdefault((shape, x.dtype, x.device), []).append((block, block.reshape(-1, *shape)))

    def orthogonalize(some: list[tuple[Tensor, Tensor]]) -> None:
        stack = some[0][1] if len(some) == 1 else torch.cat([matrices for _, matrices in some])
        result = of_singular_values(stack, None) if steps is None else newton_schulz(stack, steps)
        for (block, matrices), part in zip(some, result.split([len(m) for _, m in some]), strict=True):
            block.copy_(part.view(matrices.shape).reshape(block.shape))

    pieces = [
        some
        for parts in alike.values()
        for some in (_in_bounds(parts) if shares_calls(parts[0][1]) else [[part] for part in parts])
    ]
    if is_on_cpu(*(some[0][1] for some in pieces)):
        share_out(orthogonalize, pieces)
    else:
        for some in pieces:
            orthogonalize(some)


def _in_bounds(parts: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Cut a list so that the tensors of each piece have at most `WORK_NUMEL` entries together, or are one."""
    pieces: list[list[tuple[Tensor, Tensor]]] = []
    room = 0
    for part in parts:
        if part[0].numel() > room:
            pieces.append([])
            room = WORK_NUMEL
        pieces[-1].append(part)
        room -= part[0].numel()
    return pieces


def _map_matrices(
    function: Callable[..., Tensor], x: Tensor, param_ndim: int | None, row_blocks: int, *columns: Number
) -> Tensor:
    """Apply `function` to the matrices of `x`, stacked; `columns` have one entry per datum."""
    k = datum_ndim(checked_float("x", x).ndim, param_ndim)
    shape = matrix_shape(x.shape, k, row_blocks)
    if x.numel() == 0:
        return x.clone()
    per_matrix = [
        c.repeat_interleave(row_blocks, 0).unsqueeze(-1) if isinstance(c, Tensor) and c.ndim else c for c in columns
    ]
    return function(x.reshape(-1, *shape), *per_matrix).to(x.dtype).reshape(x.shape)


def _radius(epsilon: Number, g: Tensor, param_ndim: int | None) -> Any:
    """The radius in a shape that broadcasts to `g`."""
    k = datum_ndim(checked_float("g", g).ndim, param_ndim)
    column = per_datum("epsilon", epsilon, g, k)
    if not isinstance(column, Tensor):
        return column
    return column.to(g.dtype).reshape(*g.shape[: g.ndim - k], *(1,) * k)
