"""Projections of one datum that is larger than a block: in place, by pieces.

A row is a matrix of one row. The multiplier of its constraint is found from sums over its pieces, in float64; no
temporary is as large as the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rai_toolbox.kernels._factors import slack
from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._multipliers import Shift, scale_for_square_sum, shift_for_sum
from rai_toolbox.kernels._norms import plain_norm
from rai_toolbox.kernels._portable import Bound, Number, clip, column, folded
from rai_toolbox.kernels._scratch import PIECE_NUMEL, pieces


def project_large_(row: Tensor, epsilon: Number, low: Bound, high: Bound, p: int) -> bool:
    """Replace a row by the nearest point of {‖z‖_p ≤ epsilon} ∩ [low, high], p 1 or 2.

    Returns whether it is done. A row is left as it is where looking is not free, and where it or the radius is such
    that squares leave the range of float64.
    """
    eps = column(epsilon, row, torch.float64)
    if not _is_ordinary(row, eps):
        return False
    whole, sample = _columns(row)

    def bounds(part: slice) -> tuple[Bound, Bound]:
        return tuple(v[:, part] if isinstance(v, Tensor) else v for v in (low, high))  # pyright: ignore

    norms = [plain_norm(clip(row[0, part].double(), *bounds(part)).flatten(), p, 1) for part in whole]
    norm = plain_norm(torch.cat(norms), p, 1).view(1, 1)
    relative, absolute = slack(row.dtype, row.shape[1], p)
    if bool(norm <= eps * (1 + relative) + absolute):
        for part in whole if low is not None or high is not None else ():
            row[:, part] = clip(row[:, part], *bounds(part))
        return True

    def turned(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = row[:, part].double()
        sign, least, most = folded(x, *bounds(part))
        return sign, x * sign, least, torch.minimum(most, torch.maximum(eps, least))

    largest = _largest(row)
    if p == 1:

        def shifted(parts: Sequence[slice], total: Tensor, start: Tensor | None = None) -> Shift:
            return shift_for_sum(
                lambda: (turned(part)[1:] for part in parts), torch.zeros_like(eps), largest, total, start
            )

        found = shifted(whole, eps, shifted(sample, eps / len(whole)).theta)
        unit = torch.ones_like(eps)
    else:

        def scaled() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for part in whole:
                _, y, least, most = turned(part)
                yield y / largest, least / eps, most / eps

        found = scale_for_square_sum(scaled, largest / norm, largest / eps)
        unit = eps
    for part in whole:
        sign, y, least, most = turned(part)
        z = found.of(y if p == 1 else y / largest) * unit
        row[:, part] = torch.minimum(torch.maximum(z, least), most) * sign
    return True


def put_large_on_simplex_(row: Tensor, total: Number) -> bool:
    """Replace a row by the nearest point of {z ≥ 0, Σz = total}; returns as `project_large_`."""
    s = column(total, row, torch.float64)
    if not _is_ordinary(row, s):
        return False
    whole, sample = _columns(row)
    found = torch.stack([row[:, part].double().sum(1) for part in whole]).sum(0).view(1, 1)
    relative, absolute = slack(row.dtype, row.shape[1], 1)
    if bool((found - s).abs() <= s * relative + absolute) and bool(row.amin() >= 0):
        return True
    top = row.amax().double()

    def y(part: slice) -> Tensor:
        return row[:, part].double() - top

    def shifted(parts: Sequence[slice], share: Tensor, start: Tensor | None = None) -> Shift:
        return shift_for_sum(lambda: ((y(part), None, s) for part in parts), -s, torch.zeros_like(s), share, start)

    shift = shifted(whole, s, shifted(sample, s / len(whole)).theta)
    for part in whole:
        row[:, part] = shift.of(y(part)).clamp_min_(0).minimum(s)
    return True


def _columns(row: Tensor) -> tuple[list[slice], list[slice]]:
    """Slices that make up the row, and one that is a sample of it."""
    whole = [slice(start, start + PIECE_NUMEL) for start in range(0, row.shape[1], PIECE_NUMEL)]
    return whole, [slice(None, None, len(whole))]


def _largest(row: Tensor) -> Tensor:
    return torch.stack([piece.abs().amax() for piece in pieces(row)]).amax().double().view(1, 1)


def _is_ordinary(row: Tensor, radius: Tensor) -> bool:
    """Whether squares and sums of the entries, and of the radius, are within the range of float64."""
    return can_branch_on_values(row) and float(_largest(row)) < 1e140 and 1e-140 < float(radius) < 1e140
