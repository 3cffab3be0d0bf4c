"""Functions of tensors in place, by kernels of the device where there are such.

Each returns whether it has done it; `scale_by_norm_`, which may do a part, returns which tensors are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._layout import as_rows
from rai_toolbox.kernels import _rows
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.kernels._machine import has_kernels as has_kernels

Number: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None


def dense(x: Tensor, k: int, *, ordered: bool = False) -> Tensor | None:
    """`x` as contiguous data of the memory of `x`, in any order of a datum's entries unless `ordered`; else None."""
    if x.is_contiguous():
        return x
    rows = None if ordered or x.layout is not torch.strided else as_rows(x, k)
    return rows if rows is not None and rows.is_contiguous() else None


def length_of(x: Tensor, k: int) -> int:
    """How many entries a datum has."""
    return math.prod(x.shape[x.ndim - k :])


@torch.no_grad()
def scale_by_norm_(xs: Sequence[Tensor], ks: Sequence[int], factor: NormFactor) -> list[int]:
    """Multiply every datum by a factor of its norm. Returns the indices of the tensors for which it was not done."""
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    dense_ones: dict[int, Tensor] = {}
    rest = []
    for i, (x, k) in enumerate(zip(xs, ks, strict=True)):
        rows = dense(x, k)
        if rows is None:
            rest.append(i)
        elif x.numel():
            dense_ones[i] = rows
            alike.setdefault((x.dtype, x.device), []).append(i)
    for indices in alike.values():
        lengths = [length_of(xs[i], ks[i]) for i in indices]
        if not _rows.scale_by_norm_([dense_ones[i] for i in indices], lengths, factor):
            rest += indices
    return rest


@torch.no_grad()
def keep_largest_(xs: Sequence[Tensor], ks: Sequence[int], counts: Sequence[int]) -> bool:
    """Zero all but the `counts` entries of largest magnitude of each datum."""
    if not xs or not all(x.numel() and count for x, count in zip(xs, counts, strict=True)):
        return False
    return _rows.keep_largest_(xs, [length_of(x, k) for x, k in zip(xs, ks, strict=True)], counts)


@torch.no_grad()
def signs_of_largest_(xs: Sequence[Tensor], ks: Sequence[int], counts: Sequence[int], scale: Number) -> bool:
    """As `keep_largest_`, then the sign, divided by how many of these are not zero, times the scale."""
    if not xs or not all(x.numel() and count for x, count in zip(xs, counts, strict=True)):
        return False
    return _rows.signs_of_largest_(xs, [length_of(x, k) for x, k in zip(xs, ks, strict=True)], counts, scale)


@torch.no_grad()
def put_l1_vertices_(x: Tensor, k: int, scale: Number) -> bool:
    """Put the scale by its sign, + for zero, in the place of the largest entry of each datum, and zero elsewhere."""
    return bool(x.numel()) and _rows.put_l1_vertices_(x, length_of(x, k), scale)


@torch.no_grad()
def project_(x: Tensor, k: int, radius: Number, low: Bound, high: Bound, p: int) -> bool:
    """Replace each datum by the nearest point of the ball of order 1 or 2, and of a box."""
    boxed = low is not None or high is not None
    rows = dense(x, k, ordered=boxed) if x.numel() else None
    if rows is None:
        return False
    if boxed:
        return _rows.project_on_ball_and_box_(rows, length_of(x, k), radius, low, high, p)
    return _rows.project_on_ball_(rows, length_of(x, k), radius, p)


@torch.no_grad()
def put_on_simplex_(x: Tensor, k: int, total: Number) -> bool:
    """Replace each datum by the nearest point of the simplex."""
    rows = dense(x, k) if x.numel() else None
    return rows is not None and _rows.project_on_simplex_(rows, length_of(x, k), total)


def is_differentiated(*values: Number | Bound) -> bool:
    """Whether a gradient may be asked of a function of these."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
