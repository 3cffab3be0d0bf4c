"""Memory of a thread that is used again, and the pieces that one large datum is worked on by."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import can_branch_on_values

# How many entries are worked on together at most, where several temporaries of that size are needed.
WORK_NUMEL = 2**20

# How large the pieces are that a datum of more entries than that is worked on by.
PIECE_NUMEL = 2**18

# Of so many shapes a piece of kept memory has views at the ready: a new one takes 20 µs.
_MOST_VIEWS = 64

_kept_memory = threading.local()


def scratch(like: Tensor, slot: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized memory of the shape of `like`, valid until the same slot is asked for again in this thread.

    A fresh temporary of a megabyte costs page faults several times the arithmetic on it, so each thread keeps a few (up
    to 4 MB of float32 each). A function of rows may return it; what reaches a caller must have memory of its own.
    """
    dtype = dtype or like.dtype
    if like.numel() > WORK_NUMEL or not can_branch_on_values(like):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return kept_memory(like.shape, slot, dtype)


def memory(shape: Sequence[int], slot: int | str, dtype: torch.dtype) -> Tensor:
    """As `scratch`, on a CPU, where looking at values is free."""
    if math.prod(shape) > 2 * WORK_NUMEL:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return kept_memory(shape, slot, dtype)


def kept_memory(shape: Sequence[int], slot: int | str, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory of this thread; see `scratch`."""
    slots: dict[tuple[int | str, torch.dtype], tuple[Tensor, dict[Sequence[int], Tensor]]] | None
    slots = getattr(_kept_memory, "slots", None)
    if slots is None:
        slots = _kept_memory.slots = {}
    memory, views = slots.get((slot, dtype), (None, {}))
    view = views.get(shape)
    if view is None:
        numel = math.prod(shape)
        with torch.inference_mode(False), torch.no_grad():
            if memory is None or memory.numel() < numel:
                memory = torch.empty(numel, dtype=dtype, device="cpu")
                views = {}
            elif len(views) >= _MOST_VIEWS:
                views.clear()
            view = views[tuple(shape)] = memory[:numel].view(tuple(shape))
        slots[slot, dtype] = memory, views
    return view


def is_kept(x: Tensor) -> bool:
    if not can_branch_on_values(x):
        return False
    address = x.untyped_storage().data_ptr()
    return any(address == m.untyped_storage().data_ptr() for m, _ in getattr(_kept_memory, "slots", {}).values())


def is_shared_out(x: Tensor) -> bool:
    """Whether blocks of a tensor are shared out among threads, and small tensors put together."""
    return can_branch_on_values(x)


def is_large(rows: Tensor) -> bool:
    """Whether a matrix is one datum larger than what is worked on together; see `_large_*.py`."""
    return rows.shape[0] == 1 and rows.numel() > WORK_NUMEL


def pieces(row: Tensor) -> tuple[Tensor, ...]:
    """Cut a datum, a matrix of one row, into views of bounded size."""
    return row.split(PIECE_NUMEL, 1)
