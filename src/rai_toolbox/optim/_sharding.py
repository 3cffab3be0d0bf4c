"""Transforms of sharded tensors (DTensors), by how far an entry's result reaches.

Where data are whole on a rank, or an entry's result depends on that entry alone, each rank changes its own part and
nothing is sent. Where data are cut,

- a transform by norm has every rank measure its part, exchanges the norms of all tensors at once, and has every rank
  scale its part;
- any other transform has each datum brought to one rank, which changes it and sends the parts of the result back;
- what cannot be shared out so, and what a user's hook sees, is gathered, in buffers of at most `GATHER_BYTES` (a single
  tensor may be larger): all ranks do the same work on whole data, and keep their part of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional._layout import write_through
from rai_toolbox.optim._memory import Noted
from rai_toolbox.optim._running import Remembering
from rai_toolbox.optim._sharded_data import DatumJob, change_on_owners_, within
from rai_toolbox.optim._sharded_norms import NormJob, scale_by_exchanged_norms_
from rai_toolbox.optim._shards import (
    ALIGNMENT,
    Bundle,
    Layout,
    Ranges,
    as_sharded,
    gather,
    local_part,
    put_part_,
    take_part_,
)
from rai_toolbox.optim._tensors import scale_and_shift_
from rai_toolbox.optim._transforms import ByNorm, Entrywise, Hook, PerDatum, Transform

# How many bytes of whole tensors a rank has at once: a bound of the memory that cut data take, but for one tensor that
# is larger by itself.
GATHER_BYTES = 2**29


@dataclasses.dataclass(eq=False)
class Job:
    """A transform of one sharded tensor, whose last k dimensions are a datum; a scale and a bias follow it."""

    transform: Transform | None
    x: Any
    k: int
    layout: Layout
    scale: float = 1.0
    bias: float = 0.0

    @property
    def part(self) -> Tensor:
        return local_part(self.x)


def run(jobs: Sequence[Job]) -> None:
    """Run the first job of every tensor, then the second of those that have two (the links of a chain), and so on."""
    turns: list[list[Job]] = []
    seen: dict[int, int] = {}
    for job in jobs:
        turn = seen.get(id(job.x), 0)
        seen[id(job.x)] = turn + 1
        if turn == len(turns):
            turns.append([])
        if job.layout.coordinate is not None:  # else this rank holds nothing of it
            turns[turn].append(job)
    for some in turns:
        _run_together(some)


def _run_together(jobs: Sequence[Job]) -> None:
    whole: dict[int, list[Job]] = {}
    by_norm: list[NormJob] = []
    by_datum: list[DatumJob] = []
    for job in jobs:
        if job.transform is None:
            continue
        if isinstance(job.transform, Remembering | Entrywise) or not job.layout.cutting(job.k):
            whole.setdefault(id(job.transform), []).append(job)
        elif isinstance(job.transform, ByNorm):
            by_norm.append(NormJob(job.transform, job.part, job.k, job.layout))
        else:
            assert isinstance(job.transform, PerDatum)
            by_datum.append(DatumJob(job.transform, job.part, job.k, job.layout))
    for alike in whole.values():
        _apply_to_whole_data_(alike)
    if by_norm:
        scale_by_exchanged_norms_(by_norm)
    if by_datum:
        _apply_to_gathered_data_(change_on_owners_(by_datum, GATHER_BYTES))
    for job in jobs:
        if job.scale != 1 or job.bias != 0:
            scale_and_shift_([job.part], job.scale, job.bias)


def _apply_to_whole_data_(jobs: Sequence[Job]) -> None:
    transform = jobs[0].transform
    if isinstance(transform, PerDatum) and transform.within is not None and not transform.alike:
        for job in jobs:
            held = job.layout.held(job.layout.with_coordinates({}))
            within(transform, job.layout, job.k, held).apply_(write_through(job.part), job.k)
    else:
        assert transform is not None
        transform.change_([write_through(job.part) for job in jobs], [job.k for job in jobs])


# By gathering.


def _apply_to_gathered_data_(jobs: Sequence[DatumJob]) -> None:
    batch: list[DatumJob] = []
    size = 0
    for job in jobs:
        if batch and size + job.nbytes > GATHER_BYTES:
            _apply_to_some_gathered_data_(batch)
            batch, size = [], 0
        batch.append(job)
        size += job.nbytes
    _apply_to_some_gathered_data_(batch)


def _apply_to_some_gathered_data_(jobs: Sequence[DatumJob]) -> None:
    for job, (data, held) in zip(jobs, _gathered([(job.layout, job.k, [job.part]) for job in jobs]), strict=True):
        within(job.transform, job.layout, job.k, held).apply_(data[0], job.k)
        take_part_(job.part, data[0], _own(job.layout, job.k))


def _own(layout: Layout, k: int) -> tuple[Ranges, ...]:
    """What this rank holds of the data that it holds any of: everything along the batch, its part along the datum."""
    held, part = layout.held(layout.with_coordinates({})), layout.part_shape(layout.with_coordinates({}))
    batch_ndim = len(part) - k
    return (*((range(n),) for n in part[:batch_ndim]), *held[batch_ndim:])


def _gathered(
    tensors: Sequence[tuple[Layout, int, list[Tensor]]],
) -> Iterator[tuple[list[Tensor], tuple[Ranges, ...]]]:
    """The whole data of the rows that this rank holds a part of, and which entries of the tensor they are.

    tensors: for each: its layout, how many dimensions are a datum, and the local parts of one or several such tensors.
    """
    bundles = [Bundle(layout, layout.cutting(k), _packed(layout, parts)) for layout, k, parts in tensors]
    gather(bundles)
    for bundle, (layout, k, parts) in zip(bundles, tensors, strict=True):
        batch_ndim = len(layout.shape) - k
        own = layout.held(layout.with_coordinates({}))
        batch = layout.part_shape(layout.with_coordinates({}))[:batch_ndim]
        data = [part.new_empty((*batch, *layout.shape[batch_ndim:])) for part in parts]
        for received, other in zip(bundle.values, bundle.coordinates, strict=True):
            coordinate = layout.with_coordinates(other)
            shape = layout.part_shape(coordinate)
            held = (*((range(n),) for n in batch), *layout.held(coordinate)[batch_ndim:])
            offset = 0
            for x in data:
                n = x.element_size() * torch.Size(shape).numel()
                put_part_(x, received[offset : offset + n].view(x.dtype).view(shape), held)
                offset += _room(layout, x)
        bundle.values = bundle.values[:0]
        yield data, (*own[:batch_ndim], *((range(n),) for n in layout.shape[batch_ndim:]))


def _room(layout: Layout, part: Tensor) -> int:
    """How many bytes the largest part takes, so that parts of any dtype can follow one another."""
    n = torch.Size(layout.largest_part_shape()).numel() * part.element_size()
    return -(-n // ALIGNMENT) * ALIGNMENT


def _packed(layout: Layout, parts: Sequence[Tensor]) -> Tensor:
    """The bytes of local parts, one after the other, as many on every rank."""
    packed = torch.zeros(sum(_room(layout, part) for part in parts), dtype=torch.uint8, device=parts[0].device)
    offset = 0
    for part in parts:
        n = part.numel() * part.element_size()
        packed[offset : offset + n].view(part.dtype).view(part.shape).copy_(part)
        offset += _room(layout, part)
    return packed


# By a user's hook.


def run_hook(hook: Hook, p: Any, k: int, of: Any = None) -> None:
    """Let a user's hook change a plain tensor, its gradient and what is remembered of it in place of a sharded one.

    The tensor is this rank's part where data are whole on a rank, else the data that this rank has a part of, gathered.

    p: the parameter.
    k: how many trailing dimensions are a datum.
    of: `p` is a copy of this parameter: only what the hook begins to remember is kept, for the parameter.
    """
    layout = Layout(p)
    if layout.coordinate is None:
        return
    known = hook.known(p)
    parts = [local_part(x) for x in ([p] if p.grad is None else [p, p.grad]) + list(known.values())]
    cut = layout.cutting(k)
    data = next(_gathered([(layout, k, parts)]))[0] if cut else parts
    x: Any = data[0].detach()
    if p.grad is not None:
        x.grad = data[1]
    x._noted = Noted(dict(zip(known, data[len(parts) - len(known) :], strict=True)))
    hook.change_([x], [k])
    if cut:
        for part, whole in zip(parts, data, strict=True):
            take_part_(part, whole, _own(layout, k))
    begun: dict[str, Any] = {}
    for key, first in x._noted.first.items():
        value = first if of is not None else x._noted[key]
        part = value
        if cut:
            part = value.new_empty(parts[0].shape)
            take_part_(part, value.view(data[0].shape), _own(layout, k))
        begun[key] = as_sharded(part.view(parts[0].shape), p)
    hook.put(p if of is None else of, begun)
