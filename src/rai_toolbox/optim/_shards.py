"""Where the parts of a sharded tensor lie, and how the ranks that share a datum exchange what they know of it.

`_sharding.py` says what is exchanged. Everything here follows from shapes, meshes and placements, which all ranks know;
never from the values of a tensor, which one rank alone knows: ranks that decide differently would wait for each other.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rai_toolbox.optim._tensors import dtensor
from rai_toolbox.optim._torch_private import foreach_copy_, strided_shard

Ranges = tuple[range, ...]

ALIGNMENT = 16  # of tensors that are packed as bytes, one after the other


def local_part(x: Any) -> Tensor:
    """What this rank holds of `x`, sharing its memory."""
    part: Any = x.to_local()
    return part.wait() if hasattr(part, "wait") else part  # an AsyncCollectiveTensor


def as_sharded(part: Tensor, like: Any) -> Any:
    """A sharded tensor of the shape and the placements of another, of which this rank holds `part`."""
    return dtensor().DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class Layout:
    """Which entries of a sharded tensor a rank holds: along each dimension some ranges, together their product.

    Raises TypeError: a placement is of an unknown kind, or pending (`Partial`); the local part is not of the size that
        the placements say.
    """

    def __init__(self, x: Any) -> None:
        self.shape: tuple[int, ...] = tuple(x.shape)
        self.mesh = x.device_mesh
        coordinate: Any = self.mesh.get_coordinate()
        self.coordinate: tuple[int, ...] | None = None if coordinate is None else tuple(coordinate)
        self.laid_out: dict[Any, Any] = {}  # what is computed once for this tensor, and kept
        self._cuts: list[tuple[int, int, int]] = []  # (mesh dimension, tensor dimension, split factor)
        for mesh_dim, placement in enumerate(x.placements):
            if isinstance(placement, (dtensor().Shard, strided_shard())):
                if self.mesh.size(mesh_dim) > 1:
                    self._cuts.append((mesh_dim, placement.dim, getattr(placement, "split_factor", 1)))
            elif not isinstance(placement, dtensor().Replicate):
                raise TypeError(
                    f"a sharded tensor with the placements {x.placements} cannot be transformed: each must be Shard or "
                    f"Replicate; `x.redistribute(placements=…)` first"
                )
        if self.coordinate is not None and self.part_shape(self.coordinate) != tuple(local_part(x).shape):
            raise TypeError(
                f"a tensor of shape {self.shape} with the placements {x.placements} on {self.mesh} should have a part "
                f"of shape {self.part_shape(self.coordinate)} here, but has one of {tuple(local_part(x).shape)}: only "
                f"shards as `torch.chunk` cuts them are supported"
            )

    @property
    def form(self) -> tuple[Any, ...]:
        """All that says, with the mesh, which rank holds what."""
        return self.shape, tuple(self._cuts)

    def cutting(self, k: int) -> tuple[int, ...]:
        """The dimensions of the mesh over which a datum, the last `k` dimensions, is cut."""
        return tuple(mesh_dim for mesh_dim, dim, _ in self._cuts if dim >= len(self.shape) - k)

    def replicated(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which all ranks hold the same."""
        cut = {mesh_dim for mesh_dim, _, _ in self._cuts}
        return tuple(d for d in range(self.mesh.ndim) if d not in cut and self.mesh.size(d) > 1)

    def held(self, coordinate: Sequence[int]) -> tuple[Ranges, ...]:
        """The indices that the rank at `coordinate` of the mesh holds, along each dimension."""
        held: list[Ranges] = [(range(size),) for size in self.shape]
        for mesh_dim, dim, split in self._cuts:
            held[dim] = _chunk(held[dim], self.mesh.size(mesh_dim), coordinate[mesh_dim], split)
        return tuple(held)

    def part_shape(self, coordinate: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of the rank at `coordinate`."""
        return tuple(sum(map(len, ranges)) for ranges in self.held(coordinate))

    def largest_part_shape(self) -> tuple[int, ...]:
        """The shape of the part of the first rank: none is larger."""
        return self.part_shape((0,) * self.mesh.ndim)

    def with_coordinates(self, others: dict[int, int]) -> tuple[int, ...]:
        """This rank's coordinate with some dimensions of the mesh exchanged."""
        assert self.coordinate is not None
        return tuple(others.get(d, c) for d, c in enumerate(self.coordinate))


@functools.lru_cache(maxsize=4096)
def _chunk(held: Ranges, n: int, i: int, split: int) -> Ranges:
    """The i-th of n chunks, sizes as `torch.chunk`; with `split`, of every one of so many chunks (`_StridedShard`)."""
    pieces = [held] if split == 1 else [_chunk(held, split, j, 1) for j in range(split)]
    ranges: list[range] = []
    for piece in pieces:
        step = -(-sum(map(len, piece)) // n)
        start, stop = i * step, (i + 1) * step
        for r in piece:
            part = r[max(start, 0) : max(stop, 0)]
            if part and ranges and ranges[-1].stop == part.start:
                ranges[-1] = range(ranges[-1].start, part.stop)
            elif part:
                ranges.append(part)
            start, stop = start - len(r), stop - len(r)
    return tuple(ranges)


def part_of(x: Tensor, held: Sequence[Ranges]) -> Tensor:
    """The part of a whole tensor (a view, where it is in one piece) that the ranges `held` name."""
    for dim, ranges in enumerate(held):
        pieces = [x.narrow(dim, r.start, len(r)) for r in ranges]
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)
    return x


def put_part_(x: Tensor, part: Tensor, held: Sequence[Ranges]) -> None:
    """Write `part` where the ranges `held` of `x` say."""
    for there, here in _matching(held):
        x[there].copy_(part[here])


def take_part_(part: Tensor, x: Tensor, held: Sequence[Ranges]) -> None:
    """Fill `part` from where the ranges `held` of `x` say."""
    for there, here in _matching(held):
        part[here].copy_(x[there])


def _matching(held: Sequence[Ranges]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Slices of the whole and of the part that hold the same entries."""
    dims: list[list[tuple[slice, slice]]] = []
    for ranges in held:
        starts = itertools.accumulate(map(len, ranges), initial=0)
        dims.append([(slice(r.start, r.stop), slice(s, s + len(r))) for r, s in zip(ranges, starts, strict=False)])
    for pairs in itertools.product(*dims):
        yield tuple(there for there, _ in pairs), tuple(here for _, here in pairs)


class Bundle:
    """Numbers about tensors that are cut over the same dimensions of the same mesh; `gather` brings them to every rank.

    values, shape (parts, n): before `gather`, this rank's numbers in one row; after it, a row for each member.
    coordinates: for each row, the coordinate of its member along the dimensions `dims` of the mesh.
    """

    def __init__(self, layout: Layout, dims: tuple[int, ...], values: Tensor) -> None:
        self.layout = layout
        self.dims = dims
        self.values = values.view(1, -1)
        self.coordinates: list[dict[int, int]] = [{}]

    def _receive(self, everything: Tensor, group: Any, dims: tuple[int, ...]) -> None:
        mesh = self.layout.mesh
        n = self.values.shape[1]
        ranks, coordinates = [], []
        for position in itertools.product(*(range(mesh.size(d)) for d in dims)):
            other = dict(zip(dims, position, strict=True))
            rank = int(mesh.mesh[self.layout.with_coordinates(other)])
            ranks.append(dist.get_group_rank(group, rank))
            coordinates += [{**c, **other} for c in self.coordinates]
        if ranks != list(range(everything.shape[0])):
            everything = everything[ranks]
        self.values = everything.reshape(-1, n).to(self.values.device)
        self.coordinates = coordinates


def gather(bundles: Sequence[Bundle]) -> None:
    """Bring every member's values to every member, in one collective, or in one for each process group concerned.

    All values have one dtype, and each bundle's the same size on every rank.
    """
    groups: dict[str, tuple[Any, list[tuple[Bundle, tuple[int, ...]]]]] = {}
    for bundle in bundles:
        for d in bundle.dims:
            group = bundle.layout.mesh.get_group(d)
            groups.setdefault(group.group_name, (group, []))[1].append((bundle, (d,)))
    stages = list(groups.values())
    if len(stages) > 1 and any(covers_the_world(bundle.layout.mesh) for bundle in bundles):
        # Every rank takes part: one exchange among all costs less than one along each dimension.
        stages = [(dist.group.WORLD, [(bundle, bundle.dims) for bundle in bundles])]
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    for group, members in stages:
        sent = torch.cat([bundle.values.reshape(-1) for bundle, _ in members])
        sent = sent.to(members[0][0].layout.mesh.device_type)
        received = sent.new_empty(dist.get_world_size(group) * sent.numel())
        all_gather(received, sent, group=group)
        columns = received.view(-1, sent.numel()).split([b.values.numel() for b, _ in members], dim=1)
        for (bundle, dims), everything in zip(members, columns, strict=True):
            bundle._receive(everything, group, dims)


def exchange(
    group: Any,
    sent: Sequence[tuple[int, Tensor]],
    expected: Sequence[tuple[int, Sequence[int], torch.dtype]],
    device: str,
) -> list[Tensor]:
    """Send tensors to members of a group, and receive others, in one collective.

    sent: tensors and their receivers, in the order of the receivers.
    expected: what is received and from whom, in the order of the senders; from each, in the order in which it sends.
    device: where tensors must be for the group to exchange them.

    Returns tensors in the order of `expected`.
    """
    members = range(dist.get_world_size(group))
    rooms = [_room(x.shape, x.dtype) for _, x in sent], [_room(shape, dtype) for _, shape, dtype in expected]
    sizes: list[list[int]] = []
    for peers, room in zip(([r for r, _ in sent], [s for s, _, _ in expected]), rooms, strict=True):
        totals = dict.fromkeys(members, 0)
        for peer, n in zip(peers, room, strict=True):
            totals[peer] += n
        sizes.append(list(totals.values()))
    there = torch.zeros(sum(rooms[0]), dtype=torch.uint8, device=device)
    here = torch.empty(sum(rooms[1]), dtype=torch.uint8, device=device)
    if sent:
        foreach_copy_(_seen(there, rooms[0], [(x.shape, x.dtype) for _, x in sent]), [x for _, x in sent])
    dist.all_to_all_single(here, there, sizes[1], sizes[0], group=group)
    return _seen(here, rooms[1], [(shape, dtype) for _, shape, dtype in expected])


def _room(shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many bytes a tensor takes, so that tensors of any dtype can follow one another."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _seen(packed: Tensor, rooms: Sequence[int], forms: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Views of bytes as the tensors that were packed into them."""
    return [
        some[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
        for some, (shape, dtype) in zip(packed.split(list(rooms)), forms, strict=True)
    ]


def covers_the_world(mesh: Any) -> bool:
    """Whether every rank there is belongs to the mesh."""
    return mesh.mesh.numel() == dist.get_world_size()
