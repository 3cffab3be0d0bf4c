"""Transforms of sharded tensors (DTensors), by how far an entry's result reaches.

Where data are whole on a rank, or an entry's result depends on that entry alone, each rank changes its own part and
nothing is sent. Where data are cut,

- a transform by norm has every rank measure its part, exchanges the norms of all tensors at once, and has every rank
  scale its part;
- any other transform has the tensors gathered, in buffers of at most `GATHER_BYTES` (a single tensor may be larger);
  all ranks do the same work on whole data, and keep their part of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from rai_toolbox.functional._layout import batch_shape, datum_ndim, write_through
from rai_toolbox.functional._norms import direct_norms, safe_range, scaled_norms
from rai_toolbox.optim import _engine
from rai_toolbox.optim._shards import (
    Bundle,
    Layout,
    Ranges,
    gather,
    local_part,
    part_of,
    put_part_,
    take_part_,
)
from rai_toolbox.optim._transforms import ByNorm, Entrywise, PerDatum, Transform

# How many bytes of whole tensors are gathered at once: a bound of the memory that cut data take, but for one tensor
# that is larger by itself.
GATHER_BYTES = 2**29

_ALIGNMENT = 16


@dataclasses.dataclass
class _Job:
    """A transform of one sharded tensor, whose last k dimensions are a datum."""

    transform: Transform
    x: DTensor
    k: int
    layout: Layout

    @property
    def part(self) -> Tensor:
        return local_part(self.x)


_waiting: ContextVar[list[_Job] | None] = ContextVar("_waiting", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Let what is applied to sharded tensors in this context share its collectives: it is done at the end."""
    if _waiting.get() is not None:
        yield
        return
    jobs: list[_Job] = []
    token = _waiting.set(jobs)
    try:
        yield
    finally:
        _waiting.reset(token)
    _run_in_turn(jobs)


def apply_(transform: Transform, dtensors: Sequence[Any], param_ndim: int | None) -> None:
    """Change every tensor in place; the trailing `param_ndim` dimensions of each are one datum."""
    jobs = [_Job(transform, x, datum_ndim(x.ndim, param_ndim), Layout(x)) for x in dtensors]
    waiting = _waiting.get()
    if waiting is None:
        _run_in_turn(jobs)
    else:
        waiting += jobs


def _run_in_turn(jobs: Sequence[_Job]) -> None:
    """Run the first job of every tensor, then the second of those that have two (the links of a chain), and so on."""
    turns: list[list[_Job]] = []
    seen: dict[int, int] = {}
    for job in jobs:
        turn = seen.get(id(job.x), 0)
        seen[id(job.x)] = turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(job)
    for some in turns:
        _run(some)


def _run(jobs: Sequence[_Job]) -> None:
    whole: dict[int, list[_Job]] = {}
    by_norm: list[_Job] = []
    by_datum: list[_Job] = []
    for job in jobs:
        if job.layout.coordinate is None:  # this rank holds nothing of it
            continue
        if isinstance(job.transform, Entrywise) or not job.layout.cutting(job.k):
            whole.setdefault(id(job.transform), []).append(job)
        elif isinstance(job.transform, ByNorm):
            by_norm.append(job)
        else:
            by_datum.append(job)
    for alike in whole.values():
        _apply_to_whole_data_(alike)
    if by_norm:
        _scale_by_exchanged_norms_(by_norm)
    if by_datum:
        _apply_to_gathered_data_(by_datum)


def _apply_to_whole_data_(jobs: Sequence[_Job]) -> None:
    transform = jobs[0].transform
    if isinstance(transform, PerDatum) and transform.within is not None:
        for job in jobs:
            held = job.layout.held(job.layout.with_coordinates({}))
            _within(transform, job, held).apply_(write_through(job.part), job.k)
    else:
        _engine.apply_dense_(transform, [write_through(job.part) for job in jobs], [job.k for job in jobs])


def _within(transform: PerDatum, job: _Job, held: Sequence[Ranges]) -> PerDatum:
    """The transform for the part of the tensor that `held` names: options that are tensors are cut alike."""
    if transform.within is None:
        return transform
    layout, batch_ndim = job.layout, len(job.layout.shape) - job.k
    batch = layout.shape[:batch_ndim]

    def rows(option: Any) -> Any:
        if not isinstance(option, Tensor):
            return option
        if _engine.is_sharded(option):
            raise TypeError(
                "`epsilon` of a sharded parameter must be a number or a plain tensor on every rank, not a DTensor"
            )
        one_per_datum = option.ndim == 1 and option.numel() == batch_shape(layout.shape, job.k)[0]
        option = option.reshape(batch) if one_per_datum else option.expand(batch)
        return part_of(option, held[:batch_ndim])

    def entries(option: Any) -> Any:
        if not isinstance(option, Tensor):
            return option
        if not _engine.is_sharded(option):
            return part_of(option.expand(layout.shape), held)
        own = layout.held(layout.with_coordinates({}))
        alike = option.shape == job.x.shape and Layout(option).held(layout.with_coordinates({})) == own  # pyright: ignore
        if alike and tuple(held) == own:
            return local_part(option)  # pyright: ignore[reportArgumentType]
        raise TypeError(
            "a bound that is a DTensor must have the shape and the placements of its parameter, whose data must not be "
            "cut: give it as a plain tensor on every rank"
        )

    return transform.within(rows, entries)


# By norm.


def _scale_by_exchanged_norms_(jobs: Sequence[_Job]) -> None:
    bundled: dict[Any, list[_Job]] = {}
    for job in jobs:
        key = (job.layout.mesh, job.layout.cutting(job.k), job.transform.p)  # type: ignore[union-attr]
        bundled.setdefault(key, []).append(job)
    bundles = []
    for (_, dims, _), members in bundled.items():
        values = torch.cat([_padded_norms(job) for job in members])
        bundles.append(Bundle(members[0].layout, dims, values))
    gather(bundles)
    factors: dict[int, Tensor] = {}
    for bundle, members in zip(bundles, bundled.values(), strict=True):
        norms, infinite = _combined(bundle.values, members[0].transform.p)  # type: ignore[union-attr]
        sizes = [_rows(job.layout.largest_part_shape(), job.k) for job in members]
        _look_for_infinities_(members, norms, infinite, sizes)
        for job, norm in zip(members, norms.split(sizes), strict=True):
            factors[id(job)] = norm
    alike: dict[Any, list[_Job]] = {}
    for job in jobs:
        alike.setdefault((id(job.transform), job.x.dtype, job.part.device), []).append(job)
    for members in alike.values():
        norms = [factors[id(job)][: _rows(job.part.shape, job.k)] for job in members]
        _scale_(members, torch.cat(norms), [n.numel() for n in norms])


def _rows(shape: Sequence[int], k: int) -> int:
    return batch_shape(shape, k)[0]


def _padded_norms(job: _Job) -> Tensor:
    """The norms of this rank's part of each datum, as many on every rank."""
    norms = _local_norms(job)
    missing = _rows(job.layout.largest_part_shape(), job.k) - norms.numel()
    return torch.cat([norms, norms.new_zeros(missing)]) if missing else norms


def _local_norms(job: _Job) -> Tensor:
    """The norms of the local part of each datum: float64, right for every finite entry of a float32 or a half.

    Where an infinite datum has a limit, minus the number of infinite entries instead: they are combined otherwise.
    """
    x, k, transform = job.part, job.k, job.transform
    assert isinstance(transform, ByNorm)
    if x.numel() == 0:
        return x.new_zeros(_rows(x.shape, k), dtype=torch.float64)
    if x.device.type != "cpu" or x.is_complex():
        if x.dtype == torch.float64 or x.is_complex() or transform.p not in (1, 2, torch.inf):
            return scaled_norms(x, k, transform.p)
        dims = tuple(range(x.ndim - k, x.ndim))
        return torch.linalg.vector_norm(x, transform.p, dims, dtype=torch.float64).reshape(-1)
    norms = direct_norms(x, k, transform.p)
    low, high = safe_range(x.dtype, transform.p)
    doubtful = ~((norms >= low) & (norms <= high))
    if doubtful.any():
        data = x if k == x.ndim else x[doubtful.view(x.shape[: x.ndim - k])]
        again = scaled_norms(data, k, transform.p)
        if transform.has_limit and not again.isfinite().all():
            dims = tuple(range(data.ndim - k, data.ndim))
            infinite = data.isinf().sum(dims).reshape(-1)
            again = torch.where((infinite > 0) & ~data.isnan().sum(dims).reshape(-1).bool(), -infinite.double(), again)
        norms[doubtful] = again
    return norms


def _combined(parts: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The norms of whole data, and how many infinite entries each has, from those of their parts (one part a row)."""
    infinite = -parts.clamp_max(0).sum(0)
    a = parts.amax(0)
    a = torch.where(a > 0, a, 1.0)
    return torch.linalg.vector_norm(parts / a, p, 0) * a, infinite


def _look_for_infinities_(jobs: Sequence[_Job], norms: Tensor, infinite: Tensor, sizes: Sequence[int]) -> None:
    """Replace a datum with infinite entries, where it has a limit, by a finite one in the same direction."""
    if norms.device.type != "cpu" or not (infinite > 0).any():
        return
    for job, norm, count in zip(jobs, norms.split(sizes), infinite.split(sizes), strict=True):
        x, k = job.part, job.k
        n = _rows(x.shape, k)
        rows = (count[:n] > 0).view(*x.shape[: x.ndim - k], *(1,) * k)
        large = 2.0 ** (math.frexp(torch.finfo(x.dtype).max)[1] - 1)
        x.copy_(torch.where(rows, torch.where(x.isinf(), x.sign() * large, 0.0), x))
        norm.copy_(torch.where(count > 0, large * count ** (1 / job.transform.p), norm))  # type: ignore[union-attr]


def _scale_(jobs: Sequence[_Job], norms: Tensor, sizes: Sequence[int]) -> None:
    """Multiply the local parts (of one dtype, by one transform) by the factors of their norms."""
    transform, dtype = jobs[0].transform, jobs[0].x.dtype
    assert isinstance(transform, ByNorm)
    numels = [math.prod(job.layout.shape[len(job.layout.shape) - job.k :]) for job in jobs]
    numel = torch.cat([norms.new_full((size,), n) for size, n in zip(sizes, numels, strict=True)])
    factors = transform.factor.of_(norms.clone(), dtype, numel)
    # A norm beyond float64, or so small that its reciprocal is, becomes NaN, not a wrong number.
    factors = torch.where(norms == 0, 1.0, torch.where(norms.isfinite() & factors.isfinite(), factors, torch.nan))
    parts = [write_through(job.part) for job in jobs]
    shaped = [
        f.view(*x.shape[: x.ndim - job.k], *(1,) * job.k)
        for job, x, f in zip(jobs, parts, factors.split(sizes), strict=True)
    ]
    if parts[0].device.type != "cpu":
        for x, f in zip(parts, shaped, strict=True):
            x.mul_(f)  # computed in float64, entry by entry
        return
    working = torch.promote_types(dtype.to_real() if dtype.is_complex else dtype, torch.float32)
    size = factors.abs()
    extreme = ~(
        (size >= torch.finfo(working).tiny) & (size <= torch.finfo(working).max) | factors.isnan() | (size == 0)
    )
    if extreme.any():
        _scale_exactly_(parts, shaped, [e.view(f.shape) for e, f in zip(extreme.split(sizes), shaped, strict=True)])
        factors.masked_fill_(extreme, 1.0)
    torch._foreach_mul_(parts, [f.to(working) for f in shaped])  # pyright: ignore[reportPrivateImportUsage]


def _scale_exactly_(parts: Sequence[Tensor], factors: Sequence[Tensor], where: Sequence[Tensor]) -> None:
    """Multiply some data by factors beyond the range of the working dtype."""
    for x, f, rows in zip(parts, factors, where, strict=True):
        if rows.any():
            wide = torch.complex128 if x.is_complex() else torch.float64
            x.copy_(torch.where(rows, (x.to(wide) * f).to(x.dtype), x))


# By gathering.


def _apply_to_gathered_data_(jobs: Sequence[_Job]) -> None:
    batch: list[_Job] = []
    size = 0
    for job in jobs:
        nbytes = job.x.numel() * job.x.element_size()
        if batch and size + nbytes > GATHER_BYTES:
            _apply_to_some_gathered_data_(batch)
            batch, size = [], 0
        batch.append(job)
        size += nbytes
    _apply_to_some_gathered_data_(batch)


def _apply_to_some_gathered_data_(jobs: Sequence[_Job]) -> None:
    for job, (data, held) in zip(jobs, _gathered([(job.layout, job.k, [job.part]) for job in jobs]), strict=True):
        assert isinstance(job.transform, PerDatum)
        _within(job.transform, job, held).apply_(data[0], job.k)
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

    Parameters
    ----------
    tensors
        For each: its layout, how many dimensions are a datum, and the local parts of one or several such tensors.
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
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _packed(layout: Layout, parts: Sequence[Tensor]) -> Tensor:
    """The bytes of local parts, one after the other, as many on every rank."""
    packed = torch.zeros(sum(_room(layout, part) for part in parts), dtype=torch.uint8, device=parts[0].device)
    offset = 0
    for part in parts:
        n = part.numel() * part.element_size()
        packed[offset : offset + n].view(part.dtype).view(part.shape).copy_(part)
        offset += _room(layout, part)
    return packed


# What else a step needs.


def run_hook(run: Callable[[Tensor], None], p: Any, k: int) -> None:
    """Let a user's hook change a plain tensor, and its gradient, in place of a sharded one.

    The tensor is this rank's part where data are whole on a rank, else the data that this rank has a part of, gathered.

    Parameters
    ----------
    run : callable
        Gives a plain tensor to the hook.
    p : DTensor
        The parameter.
    k : int
        How many trailing dimensions are a datum.
    """
    waiting = _waiting.get()
    if waiting:  # what was to come before
        jobs, waiting[:] = list(waiting), []
        _run_in_turn(jobs)
    layout = Layout(p)
    if layout.coordinate is None:
        return
    parts = [local_part(p)] if p.grad is None else [local_part(p), local_part(p.grad)]
    cut = layout.cutting(k)
    data = next(_gathered([(layout, k, parts)]))[0] if cut else parts
    x = data[0].detach()
    if p.grad is not None:
        x.grad = data[1]
    run(x)
    if cut:
        for part, whole in zip(parts, data, strict=True):
            take_part_(part, whole, _own(layout, k))


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Give every sharded parameter a gradient with its own placements: pending sums (`Partial`) are carried out.

    `param.grad` is then another tensor. All pending sums over one dimension of a mesh take one collective.
    """
    pending: dict[Any, list[Tensor]] = {}
    settled: list[tuple[Any, Tensor]] = []
    for p in params:
        grad: Any = p.grad
        if not _engine.is_sharded(p) or grad is None or not _engine.is_sharded(grad):
            continue
        if grad.placements == p.placements:  # pyright: ignore[reportAttributeAccessIssue]
            continue
        dims = _dims_to_sum(grad, p)
        if dims is None:
            p.grad = grad.redistribute(placements=p.placements)  # pyright: ignore[reportAttributeAccessIssue]
            continue
        part = local_part(grad).contiguous()
        for d in dims:
            group = grad.device_mesh.get_group(d)
            pending.setdefault((group.group_name, part.dtype), [group]).append(part)
        settled.append((p, part))
    for group, *parts in pending.values():
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))
    for p, part in settled:
        p.grad = DTensor.from_local(
            part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )


def _dims_to_sum(grad: DTensor, p: Any) -> list[int] | None:
    """The dimensions of the mesh over which a sum is all that is missing. None: something else is."""
    if grad.device_mesh != p.device_mesh or grad.device_mesh.get_coordinate() is None:
        return None
    dims = []
    for d, (have, want) in enumerate(zip(grad.placements, p.placements, strict=True)):
        if isinstance(have, Partial) and have.reduce_op == "sum" and isinstance(want, Replicate):
            dims.append(d)
        elif have != want:
            return None
    return dims


def all_zero(grads: Sequence[Tensor]) -> bool:
    """Whether all entries are zero on every rank of the meshes; the same answer on all of them."""
    nonzero = any(_engine.has_nonzero(local_part(g) if isinstance(g, DTensor) else g) for g in grads)
    groups: dict[str, Any] = {}
    for g in grads:
        if isinstance(g, DTensor) and g.device_mesh.get_coordinate() is not None:
            for d in range(g.device_mesh.ndim):
                group = g.device_mesh.get_group(d)
                groups.setdefault(group.group_name, (group, g.device_mesh.device_type))
    for group, device in groups.values():
        flag = torch.tensor(float(nonzero), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        nonzero = bool(flag)
    return not nonzero


def own_parts(*tensors: Any) -> tuple[Tensor, ...]:
    """This rank's parts of tensors that broadcast to the first, which is sharded; plain ones are whole everywhere."""
    layout = Layout(tensors[0])
    if layout.coordinate is None:
        return tuple(x.new_empty(0) for x in map(local_part, tensors[:1]) for _ in tensors)
    held = layout.held(layout.coordinate)
    return tuple(local_part(x) if isinstance(x, DTensor) else part_of(x.expand(layout.shape), held) for x in tensors)
