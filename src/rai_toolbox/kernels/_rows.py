"""Run the Triton kernel if there is one for these tensors; return False if not.

Tensors come with how long a datum of each is. They are contiguous, or nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.kernels import _operators
from rai_toolbox.kernels._changes import NOTHING, Change, Kind, by_factor
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.kernels._machine import all_have_kernels

Number = float | Tensor
Bound = float | Tensor | None


def scale_by_norm_(xs: Sequence[Tensor], lengths: Sequence[int], factor: NormFactor) -> bool:
    """Multiply every datum by a factor of its norm."""
    change = by_factor(factor)
    if change is None or not all_have_kernels(xs):
        return False
    _operators.by_norm_or_entry_(xs, [], lengths, change)
    return True


def step_(
    gs: Sequence[Tensor],
    ps: Sequence[Tensor],
    lengths: Sequence[int],
    change: Change,
    keep: float,
    lr: float,
    after: Change,
) -> bool:
    """Change gradients; then p ← keep·p - lr·g for each parameter, and change these."""
    if not (all_have_kernels(gs) and all_have_kernels(ps) and gs[0].dtype == ps[0].dtype):
        return False
    _operators.by_norm_or_entry_(gs, ps, lengths, change, lr, after, keep=keep)
    return True


def keep_largest_(xs: Sequence[Tensor], lengths: Sequence[int], counts: Sequence[int]) -> bool:
    """Zero all but the `counts` entries of largest magnitude of each datum, 0 < count, the first among equals."""
    if not all_have_kernels(xs):
        return False
    _operators.keep_largest_(list(xs), list(lengths), list(counts), False, False, 1.0, None, None)
    _operators.mark_as_changed(xs)
    return True


def signs_of_largest_(xs: Sequence[Tensor], lengths: Sequence[int], counts: Sequence[int], scale: Number) -> bool:
    """As `keep_largest_`, then the sign, divided by how many of these are not zero, times the scale."""
    if not all_have_kernels(xs):
        return False
    each, radii = _split(scale)
    _operators.keep_largest_(list(xs), list(lengths), list(counts), True, False, each, radii, None)
    _operators.mark_as_changed(xs)
    return True


def put_l1_vertices_(x: Tensor, length: int, scale: Number) -> bool:
    """Put the scale by its sign, + for zero, in the place of the largest entry of each datum, and zero elsewhere."""
    if not all_have_kernels([x]):
        return False
    each, radii = _split(scale)
    _operators.keep_largest_([x], [length], [1], True, True, each, radii, None)
    _operators.mark_as_changed([x])
    return True


def project_on_ball_(x: Tensor, length: int, radius: Number, p: int) -> bool:
    """Replace each datum by the nearest point of the ball of order 1 or 2."""
    if not all_have_kernels([x]):
        return False
    number, radii = _split(radius)
    if p == 2:
        _operators.by_norm_or_entry_([x], [], [length], Change(Kind.BALL, 2, number), 0.0, NOTHING, radii)
    else:
        _operators.project_on_l1_or_simplex_([x], [length], number, radii, False)
        _operators.mark_as_changed([x])
    return True


def project_on_simplex_(x: Tensor, length: int, total: Number) -> bool:
    """Replace each datum by the nearest point with entries ≥ 0 that sum to `total`."""
    if not all_have_kernels([x]):
        return False
    number, radii = _split(total)
    _operators.project_on_l1_or_simplex_([x], [length], number, radii, True)
    _operators.mark_as_changed([x])
    return True


def project_on_ball_and_box_(x: Tensor, length: int, radius: Number, low: Bound, high: Bound, p: int) -> bool:
    """Replace each datum by the nearest point of a ball and a box, whose bounds are numbers or of the shape of x."""
    if not all_have_kernels([x]):
        return False
    number, radii = _split(radius)
    bounds = []
    for bound, absent in ((low, -torch.inf), (high, torch.inf)):
        tensor = bound.detach().reshape(-1, length) if isinstance(bound, Tensor) else None
        bounds += [tensor, absent if bound is None or tensor is not None else float(bound)]  # pyright: ignore
    _operators.project_in_box_(x, length, number, radii, *bounds, p)
    _operators.mark_as_changed([x])
    return True


def _split(value: Number) -> tuple[float, Tensor | None]:
    """A number, and numbers for each datum, of which one counts."""
    return (0.0, value.detach()) if isinstance(value, Tensor) else (float(value), None)
