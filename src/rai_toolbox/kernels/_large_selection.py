"""Top-q of one datum that is larger than a block: in place, by pieces, waiting for no device.

A row is a matrix of one row. The threshold is found from counts over its pieces; no temporary is as large as the row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import can_branch_on_values
from rai_toolbox.kernels._scratch import PIECE_NUMEL, pieces

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_largest_(row: Tensor, count: int) -> Tensor:
    """Zero all but the `count` entries of largest magnitude, 0 < count < D; no device is waited for."""
    threshold, above = _kth_largest(row, count)
    zero = row.new_zeros(())
    for piece, mask in _kept(row, threshold, count - above):
        piece.copy_(torch.where(mask, piece, zero))
    return row


def signs_of_largest_(row: Tensor, count: int, scale: float | Tensor) -> Tensor:
    """Replace the `count` entries of largest magnitude by their signs, divided by their number, times `scale`."""
    threshold, above = _kth_largest(row, count)
    work = torch.promote_types(row.dtype, torch.float32)
    # where zeros are among the kept, so is all that is not zero
    kept_count = torch.where(threshold > 0, count, above.clamp_min(1)).to(work)
    each = torch.as_tensor(scale, dtype=work, device=row.device) / kept_count
    zero = torch.zeros_like(each)
    for piece, mask in _kept(row, threshold, count - above):
        sign = torch.where(piece.isnan(), piece, piece.sign())
        piece.copy_(torch.where(mask, sign * each, zero))
    return row


def l1_vertex_(row: Tensor, scale: float | Tensor) -> Tensor:
    """Put ±`scale`, by its sign, for the entry of largest magnitude (+ for a zero datum), and zero elsewhere."""
    largest, places = zip(*(piece.abs().max(1) for piece in pieces(row)), strict=True)
    which = torch.cat(largest).argmax()  # the first among equals, and a NaN before any number
    place = which * PIECE_NUMEL + torch.cat(places)[which]
    value = row[0].gather(0, place.view(1))
    sign = torch.where(value < 0, -torch.ones_like(value), torch.ones_like(value))
    vertex = (torch.where(value.isnan(), value, sign) * scale).to(row.dtype)
    row.zero_()
    row[0].scatter_(0, place.view(1), vertex.view(1))
    return row


def _kth_largest(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A threshold that `count` magnitudes reach, or more if there are equal ones, and how many exceed it.

    NaN counts as infinite. The order of numbers ≥ 0 is that of their bits as integers: they are found one by one.
    """
    bits = _BITS[row.element_size()]
    found = torch.zeros((), dtype=bits, device=row.device)
    infinity = torch.full_like(found, torch.inf, dtype=row.dtype).view(bits)
    for bit in reversed(range(torch.iinfo(bits).bits - 1)):
        tried = found | (1 << bit)
        reached = _at_least(row, tried.view(row.dtype))
        found = torch.where((reached >= count) & (tried <= infinity), tried, found)
        if can_branch_on_values(row) and reached == count and found == tried:
            break
    above = _at_least(row, (found + 1).view(row.dtype))
    return found.view(row.dtype), torch.where(found < infinity, above, torch.zeros_like(above))


def _at_least(row: Tensor, threshold: Tensor) -> Tensor:
    """How many magnitudes are `threshold` or more, or NaN."""
    less = [(piece.abs() < threshold).to(torch.float32).sum() for piece in pieces(row)]
    return row.numel() - torch.stack(less).to(torch.int64).sum()


def _kept(row: Tensor, threshold: Tensor, room: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The pieces, and which of their entries exceed the threshold or are among the first `room` that equal it."""
    for piece in pieces(row):
        a = piece.abs()
        a = torch.where(a.isnan(), torch.inf, a)
        tied = a == threshold
        ranks = tied.cumsum(1)
        yield piece, (a > threshold) | (tied & (ranks <= room))
        room = room - ranks[0, -1]
