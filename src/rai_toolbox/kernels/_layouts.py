"""How tensors are shared out among the programs of a kernel: tables on the device, made once for given shapes.

What depends on shapes alone is in one table, the addresses of tensors in another: gradients are at new addresses after
every backward pass, and a few hundred numbers are soon copied.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A datum of at most so many entries is held by one program.
TILE_COLUMNS = 8192
# How many entries of a longer one a program works through.
PART_NUMEL = 2**14
_TILE_NUMEL = 2048
_COLUMNS = (16, 128, 1024, 4096, TILE_COLUMNS)
# Pointers to this many bytes, and data of this many entries, can be read several entries at a time.
_BYTES, _ENTRIES = 16, 8

Shapes = tuple[tuple[int, int], ...]  # of matrices, one datum a row

_captured: list[Any] = []  # what a CUDA graph reads again when it is replayed


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the programs of one launch work on."""

    # shape (7, n), int64: for each program: which tensor, from which entry, how many rows or entries, how long a datum
    # is, where the parts of its datum begin and how many there are, which row (counted over all tensors).
    table: Tensor
    # rows, columns: the shape of a tile
    rows: int
    columns: int
    warps: int  # how many share a tile
    aligned: bool  # whether every datum begins at a multiple of 8 entries
    tensors: tuple[int, ...]  # which tensors it is about

    @property
    def programs(self) -> int:
        """How many."""
        return self.table.shape[1]


def is_tiled(length: int) -> bool:
    """Whether a datum of this length is held by one program."""
    return length <= TILE_COLUMNS


def count_parts(shapes: Shapes) -> int:
    """How many parts `parts` cuts data of these shapes into."""
    return sum(n * math.ceil(length / PART_NUMEL) for n, length in shapes)


def tiles(shapes: Shapes, device: torch.device) -> list[Launch]:
    """Launches for short data, several to a tile."""
    return _cached(_tiles, shapes, device)


def parts(shapes: Shapes, device: torch.device) -> list[Launch]:
    """A launch for long data, each cut into parts."""
    return _cached(_parts, shapes, device)


def data(shapes: Shapes, counts: tuple[int, ...], per_thread: int, device: torch.device) -> list[Launch]:
    """Launches with a program for each datum, which reads it block by block, so many entries to a thread.

    `counts` is a number for each tensor, kept in the table.
    """
    return _cached(_data, (shapes, counts, per_thread), device)


def addresses(xs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, bool]:
    """The addresses of tensors, on the device, and whether all are aligned."""
    places = tuple(x.data_ptr() for x in xs)
    return _addresses(places, device, _stream(device)), all(place % _BYTES == 0 for place in places)


def _cached(make: Any, key: Any, device: torch.device) -> list[Launch]:
    if _is_captured(device):  # what is copied now is there after a replay only
        return make(key, device)
    return _made(make, key, device, _stream(device))


@functools.lru_cache(maxsize=256)
def _made(make: Any, key: Any, device: torch.device, stream: int) -> list[Launch]:
    return make(key, device)


def _stream(device: torch.device) -> int:
    """The number of the current stream: a table that one stream copies could be read too soon by another."""
    if device.type == "cpu":
        return 0
    stream = torch.get_device_module(device).current_stream(device)
    return stream.stream_id


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    if device.type == "cpu":
        return values
    if torch.get_device_module(device).is_available():
        values = values.pin_memory(device)
    copy = values.to(device, non_blocking=True)
    if _is_captured(device):
        _captured.append((values, copy))
    return copy


def _addresses(places: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    if _is_captured(device):
        return _on_device(torch.tensor(places, dtype=torch.int64, device="cpu"), device)
    return _known_addresses(places, device, stream)


@functools.lru_cache(maxsize=64)
def _known_addresses(places: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return _on_device(torch.tensor(places, dtype=torch.int64, device="cpu"), device)


def _table(columns: list[Tensor], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _on_device(torch.cat(columns, dim=1).contiguous(), device)


def _column(n: int, **fields: Tensor | int) -> Tensor:
    order = ("tensor", "offset", "count", "length", "first", "parts", "row")
    rows = [torch.as_tensor(fields.get(name, 0), dtype=torch.int64, device="cpu").expand(n) for name in order]
    return torch.stack(rows)


def _tiles(shapes: Shapes, device: torch.device) -> list[Launch]:
    kinds: dict[tuple[int, bool], list[Tensor]] = {}
    members: dict[tuple[int, bool], list[int]] = {}
    row = 0
    for i, (n, length) in enumerate(shapes):
        columns = next(c for c in _COLUMNS if length <= c)
        kind = columns, length % _ENTRIES == 0
        rows = max(1, _TILE_NUMEL // columns)
        starts = torch.arange(0, n, rows, device="cpu")
        column = _column(
            len(starts),
            tensor=i,
            offset=starts * length,
            count=(n - starts).clamp_max(rows),
            length=length,
            row=row + starts,
        )
        kinds.setdefault(kind, []).append(column)
        members.setdefault(kind, []).append(i)
        row += n
    launches = []
    for (columns, aligned), made in kinds.items():
        rows = max(1, _TILE_NUMEL // columns)
        which = tuple(members[columns, aligned])
        launches.append(Launch(_table(made, device), rows, columns, max(8, columns // 256), aligned, which))
    return launches


def _parts(shapes: Shapes, device: torch.device) -> list[Launch]:
    made = []
    first = row = 0
    for i, (n, length) in enumerate(shapes):
        each = math.ceil(length / PART_NUMEL)
        rows = torch.arange(n, device="cpu").repeat_interleave(each)
        starts = torch.arange(0, length, PART_NUMEL, device="cpu").repeat(n)
        column = _column(
            n * each,
            tensor=i,
            offset=rows * length + starts,
            count=(length - starts).clamp_max(PART_NUMEL),
            length=length,
            first=first + rows * each,
            parts=each,
            row=row + rows,
        )
        made.append(column)
        first += n * each
        row += n
    aligned = all(length % _ENTRIES == 0 for _, length in shapes)
    return [Launch(_table(made, device), 1, _TILE_NUMEL, 8, aligned, tuple(range(len(shapes))))]


def _data(key: tuple[Shapes, tuple[int, ...], int], device: torch.device) -> list[Launch]:
    shapes, counts, per_thread = key
    kinds: dict[tuple[int, bool], list[Tensor]] = {}
    members: dict[tuple[int, bool], list[int]] = {}
    row = 0
    for i, ((n, length), count) in enumerate(zip(shapes, counts, strict=True)):
        warps = 1 if length <= 256 else 16 if per_thread > 2 and length > 2**15 else 8
        kind = warps, length % _ENTRIES == 0
        rows = torch.arange(n, device="cpu")
        column = _column(n, tensor=i, offset=rows * length, count=count, length=length, row=row + rows)
        kinds.setdefault(kind, []).append(column)
        members.setdefault(kind, []).append(i)
        row += n
    return [
        Launch(_table(made, device), 1, 32 * per_thread * warps, warps, aligned, tuple(members[warps, aligned]))
        for (warps, aligned), made in kinds.items()
    ]
