"""Data that are cut between ranks, multiplied by factors of their norms: each rank measures its part, all exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.functional._layout import batch_shape, write_through
from rai_toolbox.functional._norms import direct_norms, scaled_norms
from rai_toolbox.kernels._machine import is_on_cpu, seen
from rai_toolbox.kernels._norms import safe_range
from rai_toolbox.optim._shards import Bundle, Layout, gather
from rai_toolbox.optim._torch_private import foreach_mul_
from rai_toolbox.optim._transforms import ByNorm


class NormJob(NamedTuple):
    """A transform of a sharded tensor, this rank's part of it, whose last k dimensions are a datum, and its layout."""

    transform: ByNorm
    part: Tensor
    k: int
    layout: Layout


def scale_by_exchanged_norms_(jobs: Sequence[NormJob]) -> None:
    bundled: dict[Any, list[NormJob]] = {}
    for job in jobs:
        key = (job.layout.mesh, job.layout.cutting(job.k), job.transform.p)
        bundled.setdefault(key, []).append(job)
    bundles = []
    for (_, dims, _), members in bundled.items():
        values = torch.cat([_padded_norms(job) for job in members])
        bundles.append(Bundle(members[0].layout, dims, values))
    gather(bundles)
    factors: dict[int, Tensor] = {}
    for bundle, members in zip(bundles, bundled.values(), strict=True):
        norms, infinite = _combined(bundle.values, members[0].transform.p)
        sizes = [_rows(job.layout.largest_part_shape(), job.k) for job in members]
        _look_for_infinities_(members, norms, infinite, sizes)
        for job, norm in zip(members, norms.split(sizes), strict=True):
            factors[id(job)] = norm
    alike: dict[Any, list[NormJob]] = {}
    for job in jobs:
        alike.setdefault((id(job.transform), job.part.dtype, job.part.device), []).append(job)
    for members in alike.values():
        norms = [factors[id(job)][: _rows(job.part.shape, job.k)] for job in members]
        _scale_(members, torch.cat(norms), [n.numel() for n in norms])


def _rows(shape: Sequence[int], k: int) -> int:
    return batch_shape(shape, k)[0]


def _padded_norms(job: NormJob) -> Tensor:
    """The norms of this rank's part of each datum, as many on every rank."""
    norms = _local_norms(job)
    missing = _rows(job.layout.largest_part_shape(), job.k) - norms.numel()
    return torch.cat([norms, norms.new_zeros(missing)]) if missing else norms


def _local_norms(job: NormJob) -> Tensor:
    """The norms of the local part of each datum: float64, right for every finite entry of a float32 or a half.

    Where an infinite datum has a limit, minus the number of infinite entries instead: they are combined otherwise.
    """
    x, k, transform = job.part, job.k, job.transform
    if x.numel() == 0:
        return x.new_zeros(_rows(x.shape, k), dtype=torch.float64)
    if not is_on_cpu(x) or x.is_complex():
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


def _look_for_infinities_(jobs: Sequence[NormJob], norms: Tensor, infinite: Tensor, sizes: Sequence[int]) -> None:
    """Replace a datum with infinite entries, where it has a limit, by a finite one in the same direction."""
    if not seen(lambda: bool((infinite > 0).any()), norms, infinite):
        return
    for job, norm, count in zip(jobs, norms.split(sizes), infinite.split(sizes), strict=True):
        x, k = job.part, job.k
        n = _rows(x.shape, k)
        rows = (count[:n] > 0).view(*x.shape[: x.ndim - k], *(1,) * k)
        large = 2.0 ** (math.frexp(torch.finfo(x.dtype).max)[1] - 1)
        x.copy_(torch.where(rows, torch.where(x.isinf(), x.sign() * large, 0.0), x))
        norm.copy_(torch.where(count > 0, large * count ** (1 / job.transform.p), norm))


def _scale_(jobs: Sequence[NormJob], norms: Tensor, sizes: Sequence[int]) -> None:
    """Multiply the local parts (of one dtype, by one transform) by the factors of their norms."""
    transform, dtype = jobs[0].transform, jobs[0].part.dtype
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
    if not is_on_cpu(parts[0]):
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
    foreach_mul_(parts, [f.to(working) for f in shaped])


def _scale_exactly_(parts: Sequence[Tensor], factors: Sequence[Tensor], where: Sequence[Tensor]) -> None:
    """Multiply some data by factors beyond the range of the working dtype."""
    for x, f, rows in zip(parts, factors, where, strict=True):
        if rows.any():
            wide = torch.complex128 if x.is_complex() else torch.float64
            x.copy_(torch.where(rows, (x.to(wide) * f).to(x.dtype), x))
