"""Run a function of matrices, one datum a row, over tensors of any shape and strides."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._layout import as_rows, blocks, datum_ndim, is_number, write_through
from rai_toolbox.kernels._machine import seen
from rai_toolbox.kernels._scratch import WORK_NUMEL, is_kept, is_shared_out, kept_memory
from rai_toolbox.kernels._threads import share_out

RowFunction = Callable[..., Tensor]
_Part: TypeAlias = tuple[Tensor, list[float | Tensor], list[float | Tensor | None]]

# From so many blocks on threads share them out: a search is dozens of small operators, and the interpreter runs one
# thread at a time between them (two blocks took 1.2 times as long as one after the other, twelve half as long).
FEWEST_SHARED = 4

# Tensors of at most so many entries are put together where their data are of one size: beyond, a copy costs more than
# the calls that it saves.
_TOGETHER_NUMEL = 2**18


def checked_float(name: str, x: Any) -> Tensor:
    """`x`, if it is a real floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a real floating-point tensor, got {given}")
    return x


def per_datum(name: str, value: float | Tensor, x: Tensor, k: int) -> float | Tensor:
    """Check a setting that is a number or has one entry per datum; a tensor comes back with shape (N, 1).

    Raises TypeError: neither a number nor a real tensor.
    Raises ValueError: the number is negative or NaN (so is an entry, where that can be seen without waiting for a
        device), or the shape fits neither the batch nor the number of data.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"`{name}` must be real, got a tensor of {value.dtype}")
        batch = x.shape[: x.ndim - k]
        n = math.prod(batch)
        if value.numel() == n and value.ndim == 1:
            column = value
        else:
            try:
                column = value.expand(batch).reshape(-1)
            except RuntimeError:
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}; it must be a number, or have one entry per datum: "
                    f"shape {tuple(batch)} (or broadcastable to it) or ({n},) for a tensor of shape "
                    f"{tuple(x.shape)} whose last {k} dimensions are a datum"
                ) from None
        column = column.to(x.device).unsqueeze(1)
        if seen(lambda: not bool((column.detach() >= 0).all()), column):
            raise ValueError(f"`{name}` must be at least 0 for every datum, got {value!r}")
        return column
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number or a tensor with one entry per datum, got {value!r}")
    if not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}")
    return float(value)


def per_entry(name: str, value: float | Tensor | None, x: Tensor) -> float | Tensor | None:
    """Check a bound that is None, a number or broadcastable to `x`; a tensor comes back expanded."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"`{name}` must be real, got a tensor of {value.dtype}")
        known = seen(lambda: float(value), value) if value.ndim == 0 and not value.requires_grad else None
        if known is not None:
            return per_entry(name, known, x)
        try:
            return value.to(x.device).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"`{name}` has shape {tuple(value.shape)}, which does not broadcast to {tuple(x.shape)}"
            ) from None
    if not is_number(value):
        raise TypeError(f"`{name}` must be None, a number or a tensor, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"`{name}` must not be NaN")
    return float(value)


def map_rows(
    function: RowFunction,
    x: Tensor,
    param_ndim: int | None,
    columns: Sequence[float | Tensor] = (),
    entries: Sequence[float | Tensor | None] = (),
    *,
    in_place: bool = False,
    any_order: bool = False,
) -> Tensor:
    """`function(rows, *columns, *entries)` of the data of a tensor, in place by `map_rows_`.

    function: takes a matrix with one datum per row, then the columns and entries in that layout; returns a new matrix.
    x, param_ndim: what is mapped, and how many trailing dimensions of it are a datum.
    columns: from `per_datum`: numbers, or tensors of shape (N, 1).
    entries: from `per_entry`: None, numbers, or tensors of the shape of `x`.
    in_place, any_order: see `map_rows_`.
    """
    if in_place:
        return map_rows_(function, x, param_ndim, columns, entries, any_order=any_order)
    k = datum_ndim(x.ndim, param_ndim)
    if x.numel() == 0:
        return x.clone()
    shape = (math.prod(x.shape[: x.ndim - k]), math.prod(x.shape[x.ndim - k :]))
    others = [e.reshape(shape) if isinstance(e, Tensor) else e for e in entries]
    result = function(x.reshape(shape), *columns, *others)
    return (result.clone() if is_kept(result) else result).to(x.dtype).reshape(x.shape)


def map_rows_(
    function: RowFunction,
    x: Tensor,
    param_ndim: int | None,
    columns: Sequence[float | Tensor] = (),
    entries: Sequence[float | Tensor | None] = (),
    *,
    any_order: bool = False,
) -> Tensor:
    """The in-place form of `map_rows`: block by block, so that no temporary is as large as a large `x`.

    `any_order` says that the function does not depend on the order of a datum's entries, which spares a copy where the
    memory of a datum is dense in another order (channels last). The function may use the matrix it is given as
    scratch and return it.
    """
    k = datum_ndim(x.ndim, param_ndim)
    if x.numel() == 0:
        return x
    with torch.no_grad():
        write_through(x)
        parts = list(_aligned_blocks(x, k, columns, entries))
        share_out(
            lambda part: _map_block_(function, part, k, any_order),
            parts,
            one_thread_each=parts[0][0].numel() <= WORK_NUMEL,
        )
    return x


def _map_block_(function: RowFunction, part: _Part, k: int, any_order: bool) -> None:
    block, columns, entries = part
    rows = None
    if block.is_contiguous() or (any_order and not any(isinstance(e, Tensor) for e in entries)):
        rows = as_rows(block, k)
    target = block if rows is None else rows
    shape = (math.prod(block.shape[: block.ndim - k]), math.prod(block.shape[block.ndim - k :]))
    matrix = block.reshape(shape) if rows is None else rows
    others = [e.reshape(shape) if isinstance(e, Tensor) else e for e in entries]
    result = function(matrix, *columns, *others)
    if result is not target:
        target.copy_(result.view(target.shape))


def map_rows_of_all_(
    function: RowFunction, xs: Sequence[Tensor], ks: Sequence[int], *, any_order: bool = False
) -> None:
    """`map_rows_` of every tensor of a list, whose last k dimensions are a datum, by a function of nothing but rows.

    Small tensors whose data are of one size are copied into one matrix: that costs less than the calls of a search.
    """
    alike: dict[tuple[torch.dtype, int], list[list[Tensor]]] = {}
    work: list[Callable[[], Any]] = []
    is_cut = True
    for x, k in zip(xs, ks, strict=True):
        length = math.prod(x.shape[x.ndim - k :])
        if not (0 < x.numel() <= _TOGETHER_NUMEL and x.is_contiguous() and is_shared_out(x)):
            shared = length <= WORK_NUMEL and is_shared_out(x)  # else it is shared out by itself, or not at all
            some = blocks(write_through(x).detach(), k, WORK_NUMEL) if shared else [x]
            is_cut = is_cut and shared
            work.extend(functools.partial(map_rows_, function, block, k, any_order=any_order) for block in some)
            continue
        groups = alike.setdefault((x.dtype, length), [])
        if not groups or sum(map(Tensor.numel, groups[-1])) + x.numel() > WORK_NUMEL:
            groups.append([])
        groups[-1].append(x.detach().view(-1, length))
    work.extend(functools.partial(_map_together_, function, parts) for groups in alike.values() for parts in groups)
    with torch.no_grad():
        share_out(lambda call: call(), work, FEWEST_SHARED, one_thread_each=is_cut)


def _map_together_(function: RowFunction, parts: Sequence[Tensor]) -> None:
    if len(parts) == 1:
        result = function(parts[0])
        if result is not parts[0]:
            parts[0].copy_(result)
        return
    counts = list(map(len, parts))
    rows = kept_memory((sum(counts), parts[0].shape[1]), "together", parts[0].dtype)
    result = function(torch.cat(list(parts), out=rows))
    torch._foreach_copy_(list(parts), list(result.split(counts)))  # pyright: ignore[reportPrivateImportUsage]


def _aligned_blocks(
    x: Tensor, k: int, columns: Sequence[float | Tensor], entries: Sequence[float | Tensor | None]
) -> Iterator[_Part]:
    """`blocks(x, k)` with the parts of the columns and entries that belong to each."""
    iterators = [blocks(e, k, WORK_NUMEL) if isinstance(e, Tensor) else None for e in entries]
    row = 0
    for block in blocks(x.detach(), k, WORK_NUMEL):
        n = math.prod(block.shape[: block.ndim - k])
        cols: list[float | Tensor] = [c[row : row + n] if isinstance(c, Tensor) else c for c in columns]
        ents: list[float | Tensor | None] = [
            e if i is None else next(i) for i, e in zip(iterators, entries, strict=True)
        ]
        yield block, cols, ents
        row += n
