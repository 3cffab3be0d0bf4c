"""Data that are cut between ranks, changed by a transform that needs each of them whole: each datum has one owner.

The ranks that hold parts of a datum, replicas among them, share the data of all tensors out between themselves, by what
a datum costs. Each rank sends its parts to their owners, works on the data that it owns, and sends the parts of the
results back: two exchanges for each mesh, whatever the number of tensors.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch.distributed as dist
from torch import Tensor

from rai_toolbox.functional._layout import batch_shape
from rai_toolbox.optim._shards import Layout, Ranges, covers_the_world, exchange, local_part, part_of, put_part_
from rai_toolbox.optim._tensors import is_sharded
from rai_toolbox.optim._torch_private import foreach_copy_
from rai_toolbox.optim._transforms import PerDatum

Coordinate: TypeAlias = tuple[int, ...]
Share: TypeAlias = tuple[Coordinate, int, int]


class DatumJob(NamedTuple):
    """A transform of a sharded tensor, this rank's part of it, whose last k dimensions are a datum, and its layout."""

    transform: PerDatum
    part: Tensor
    k: int
    layout: Layout

    @property
    def datum(self) -> tuple[int, ...]:
        """The shape of a datum."""
        return self.layout.shape[len(self.layout.shape) - self.k :]

    @property
    def cost(self) -> int:
        """What a datum costs, for comparison with others."""
        return max(1, self.transform.cost(self.datum))

    @property
    def nbytes(self) -> int:
        """The size of the whole tensor."""
        return math.prod(self.layout.shape) * self.part.element_size()


class _Piece(NamedTuple):
    """A part of some data of one tensor, which a rank holds and another, or the same, owns."""

    peer: int  # the other rank, by its place in the group
    job: int
    rows: slice  # which of the data that the ranks of the tensor's team share
    held: tuple[Ranges, ...]  # which entries of these data it has
    brings: bool  # whether the holder sends it to the owner: of replicas one does, and all receive the result

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(map(len, ranges)) for ranges in self.held)


class _Meeting(NamedTuple):
    """Tensors of one mesh, and the process group whose members exchange their data."""

    group: Any
    jobs: list[DatumJob]
    dims: tuple[int, ...]  # the dimensions of the mesh that the group spans
    teams: list[tuple[int, ...]]  # for each tensor, those along which ranks hold parts or copies of the same data


def change_on_owners_(jobs: Sequence[DatumJob], most_bytes: int) -> list[DatumJob]:
    """Change cut data in place, each on its owner; return the jobs that are not worth it, or that cannot be.

    jobs: their data are cut.
    most_bytes: what a rank sends and receives at once, at most; a single tensor may be larger.
    """
    left: list[DatumJob] = []
    by_mesh: dict[Any, list[DatumJob]] = {}
    for job in jobs:
        by_mesh.setdefault(job.layout.mesh, []).append(job)
    for mesh, some in by_mesh.items():
        if sum(batch_shape(job.layout.shape, job.k)[0] for job in some) == 1:
            left += some  # one datum: to gather it on every rank takes one exchange, not two
            continue
        for part in _bounded(some, most_bytes * mesh.mesh.numel()):
            meetings, others = _meetings(part)
            left += others
            for meeting in meetings:
                _change_owned_data_(meeting)
    return left


def _bounded(jobs: Sequence[DatumJob], most_bytes: int) -> Iterator[list[DatumJob]]:
    some: list[DatumJob] = []
    size = 0
    for job in jobs:
        if some and size + job.nbytes > most_bytes:
            yield some
            some, size = [], 0
        some.append(job)
        size += job.nbytes
    yield some


def _meetings(jobs: Sequence[DatumJob]) -> tuple[list[_Meeting], list[DatumJob]]:
    """Assign jobs of one mesh to process groups that exist; return these meetings, and the jobs that none fits."""
    mesh = jobs[0].layout.mesh
    teams = [tuple(sorted({*job.layout.cutting(job.k), *job.layout.replicated()})) for job in jobs]
    dims = tuple(sorted(set().union(*teams)))
    if len(dims) > 1 and covers_the_world(mesh):
        return [_Meeting(dist.group.WORLD, list(jobs), tuple(range(mesh.ndim)), teams)], []
    meetings: dict[int, _Meeting] = {}
    others: list[DatumJob] = []
    for job, team in zip(jobs, teams, strict=True):
        team = team if len(team) == 1 else job.layout.cutting(job.k)  # else each replica does all of the work
        if len(team) != 1:
            others.append(job)
            continue
        meeting = meetings.setdefault(team[0], _Meeting(mesh.get_group(team[0]), [], team, []))
        meeting.jobs.append(job)
        meeting.teams.append(team)
    return list(meetings.values()), others


def shares(meeting: _Meeting) -> list[list[Share]]:
    """Say which rank owns which of the data that this rank has parts of: for each tensor, a coordinate and a range.

    The data that cost most are assigned first, to the ranks with the least work. Shapes alone decide, so all ranks
    find the same.
    """
    load: dict[Coordinate, int] = defaultdict(int)
    own: list[list[Share]] = [[] for _ in meeting.jobs]
    costs = [job.cost for job in meeting.jobs]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        job, team = meeting.jobs[i], meeting.teams[i]
        layout = job.layout
        others = [d for d in meeting.dims if d not in team]
        for place in _positions(layout, others):
            members = [layout.with_coordinates({**place, **position}) for position in _positions(layout, team)]
            batch = math.prod(layout.part_shape(members[0])[: len(layout.shape) - job.k])
            counts = evened([load[m] for m in members], batch, costs[i])
            start = 0
            for member, count in zip(members, counts, strict=True):
                load[member] += count * costs[i]
                if count and layout.coordinate in members:
                    own[i].append((member, start, start + count))
                start += count
    return own


def _positions(layout: Layout, dims: Sequence[int]) -> Iterator[dict[int, int]]:
    for position in itertools.product(*(range(layout.mesh.size(d)) for d in dims)):
        yield dict(zip(dims, position, strict=True))


def evened(loads: Sequence[int], n: int, cost: int) -> list[int]:
    """How many of `n` items of one cost each rank gets, so that the largest of their loads is least."""
    order = sorted(loads)
    level = 0
    for j in range(len(order), 0, -1):
        level = (sum(order[:j]) + n * cost) // j
        if order[j - 1] <= level:
            break
    counts = [max(0, level - load) // cost for load in loads]
    for _ in range(n - sum(counts)):
        least = min(range(len(loads)), key=lambda i: loads[i] + counts[i] * cost)
        counts[least] += 1
    return counts


def _pieces(meeting: _Meeting) -> tuple[list[_Piece], list[_Piece]]:
    """The pieces that this rank holds, and those that it owns, in the order of the other ranks."""
    held: list[_Piece] = []
    owned: list[_Piece] = []
    for i, (job, team, given) in enumerate(zip(meeting.jobs, meeting.teams, shares(meeting), strict=True)):
        layout, batch_ndim = job.layout, len(job.layout.shape) - job.k
        copies = [d for d in team if d in layout.replicated()]
        ranks = {
            coordinate: dist.get_group_rank(meeting.group, int(layout.mesh.mesh[coordinate]))
            for coordinate in (layout.with_coordinates(position) for position in _positions(layout, team))
        }
        me = layout.with_coordinates({})
        for owner, start, stop in given:
            rows = slice(start, stop)

            def piece(peer: Coordinate, holder: Coordinate, owner: Coordinate = owner, rows: slice = rows) -> _Piece:
                entries = (range(rows.stop - rows.start),), *layout.held(holder)[batch_ndim:]  # noqa: B023
                brings = all(owner[d] == holder[d] for d in copies)  # noqa: B023
                return _Piece(ranks[peer], i, rows, entries, brings)  # noqa: B023

            held.append(piece(owner, me))
            if owner == me:
                owned += [piece(holder, holder) for holder in ranks]
    return sorted(held, key=lambda p: p.peer), sorted(owned, key=lambda p: p.peer)


def _change_owned_data_(meeting: _Meeting) -> None:
    jobs = meeting.jobs
    held, owned = _pieces_of(meeting)
    parts = [job.part.reshape(batch_shape(job.part.shape, job.k)) for job in jobs]
    device = jobs[0].layout.mesh.device_type

    sent = [(p.peer, parts[p.job][p.rows]) for p in held if p.brings]
    expected = [(p.peer, p.shape, parts[p.job].dtype) for p in owned if p.brings]
    arrived = exchange(meeting.group, sent, expected, device)

    data = {p.job: (p.rows, parts[p.job].new_empty(p.shape[0], *jobs[p.job].datum)) for p in owned}
    for p, part in zip((p for p in owned if p.brings), arrived, strict=True):
        put_part_(data[p.job][1], part, p.held)
    _change_([(jobs[i], *some) for i, some in data.items()])

    sent = [(p.peer, part_of(data[p.job][1], p.held)) for p in owned]
    expected = [(p.peer, p.shape, parts[p.job].dtype) for p in held]
    results = exchange(meeting.group, sent, expected, device)
    if held:
        foreach_copy_([parts[p.job][p.rows] for p in held], [x.to(parts[0].device) for x in results])
    for job, part in zip(jobs, parts, strict=True):
        if part.data_ptr() != job.part.data_ptr():  # a copy, as of a part that is not contiguous
            job.part.copy_(part.view(job.part.shape))


def _pieces_of(meeting: _Meeting) -> tuple[list[_Piece], list[_Piece]]:
    """`_pieces`, which are found once for the same tensors: the layouts are kept from step to step."""
    first = meeting.jobs[0].layout
    key = (
        meeting.dims,
        tuple((job.layout.form, job.k, job.cost, team) for job, team in zip(meeting.jobs, meeting.teams, strict=True)),
    )
    if key not in first.laid_out:
        if len(first.laid_out) >= 8:  # a chain has a few entries, for its stages
            first.laid_out.clear()
        first.laid_out[key] = _pieces(meeting)
    return first.laid_out[key]


def _change_(data: Sequence[tuple[DatumJob, slice, Tensor]]) -> None:
    """Change whole data in place; those that one transform changes alike share its calls."""
    alike: dict[int, list[tuple[DatumJob, Tensor]]] = {}
    for job, rows, x in data:
        if job.transform.within is not None and not job.transform.alike:
            layout, batch_ndim = job.layout, len(job.layout.shape) - job.k
            batch = layout.held(layout.with_coordinates({}))[:batch_ndim]
            whole = (*batch, *((range(n),) for n in job.datum))
            within(job.transform, layout, job.k, whole, rows).apply_(x, job.k)
        else:
            alike.setdefault(id(job.transform), []).append((job, x))
    for some in alike.values():
        some[0][0].transform.change_([x for _, x in some], [job.k for job, _ in some])


def within(transform: PerDatum, layout: Layout, k: int, held: Sequence[Ranges], data: slice | None = None) -> PerDatum:
    """Return the transform for the part of a tensor that `held` names: options that are tensors are cut alike.

    layout: of the tensor, whose last `k` dimensions are a datum.
    data: only so many of the data in that part, one after the other.
    """
    if transform.within is None:
        return transform
    batch_ndim = len(layout.shape) - k
    batch = layout.shape[:batch_ndim]

    def rows(option: Any) -> Any:
        if not isinstance(option, Tensor):
            return option
        if is_sharded(option):
            raise TypeError(
                "`epsilon` of a sharded parameter must be a number or a plain tensor on every rank, not a DTensor"
            )
        one_per_datum = option.ndim == 1 and option.numel() == batch_shape(layout.shape, k)[0]
        option = option.reshape(batch) if one_per_datum else option.expand(batch)
        option = part_of(option, held[:batch_ndim])
        return option if data is None else option.reshape(-1)[data]

    def entries(option: Any) -> Any:
        if not isinstance(option, Tensor):
            return option
        if not is_sharded(option):
            option = part_of(option.expand(layout.shape), held)
            return option if data is None else option.reshape(-1, *layout.shape[batch_ndim:])[data]
        own = layout.held(layout.with_coordinates({}))
        alike = tuple(option.shape) == layout.shape and Layout(option).held(layout.with_coordinates({})) == own
        if alike and tuple(held) == own:
            return local_part(option)
        raise TypeError(
            "a bound that is a DTensor must have the shape and the placements of its parameter, whose data must not be "
            "cut: give it as a plain tensor on every rank"
        )

    return transform.within(rows, entries)
