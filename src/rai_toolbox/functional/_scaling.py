"""Multiply many tensors by factors of their norms, in place, in as few passes and calls as the memory allows.

On a CPU the tensors are worked on in bundles that fit the cache, so that the pass that multiplies finds what the pass
that measured has read. Small tensors of one shape are stacked. All that depends on shapes alone (buffers for norms
and factors, and views of them) is laid out once, in a `ScalingPlan`, and used at every step.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional import _by_kernels
from rai_toolbox.functional._docs import documented
from rai_toolbox.functional._large_scaling import large_norm, multiply_large_, redo_, scale_large_datum_, scaled_exactly
from rai_toolbox.functional._layout import BLOCK_NUMEL, as_rows, block_indices, blocks, datum_ndim, write_through
from rai_toolbox.functional._norms import TINY, check_floating, check_order
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.kernels._machine import is_on_cpu
from rai_toolbox.kernels._norms import is_summed, piece_length, safe_factors, safe_range, summed_norms
from rai_toolbox.kernels._threads import share_out

# Up to so many entries, norms are computed in float64 from the start.
_LITTLE_NUMEL = 2**14

# Tensors of at most so many entries are stacked when there are several of one shape: beyond, a copy costs more than
# the calls that it saves.
STACKED_NUMEL = 2**12

# The factors of at most so many data are computed by the interpreter: an operator gives up the lock that threads share,
# and waits for it again, 10 µs where another one has it.
_FEW = 32


@documented
def normalize_(
    x: Tensor | Sequence[Tensor], p: float = 2, *, param_ndim: int | None = -1, eps: float = TINY, scale: float = 1.0
) -> Tensor | Sequence[Tensor]:
    """Divide each datum by its Lp norm in place, and multiply by `scale`; the in-place form of `normalize`.

    Parameters
    ----------
    x : Tensor or sequence of Tensor
        Changed in place; any strides. A sequence is treated together, which is faster than one by one.
    eps : float
        As for `normalize`.
    scale : float
        A factor of the result.

    Returns
    -------
    Tensor or sequence of Tensor
        `x`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.functional import normalize_
    >>> normalize_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), scale=10.0)
    tensor([[ 6.,  8.],
            [ 0., 10.]])
    """
    check_order(p)
    xs = [x] if isinstance(x, Tensor) else x
    ks = [datum_ndim(check_floating(t).ndim, param_ndim) for t in xs]
    with torch.no_grad():
        scale_by_norm_([write_through(t) for t in xs], ks, NormFactor("normalize", p, eps, scale))
    return x


def scale_by_norm_(
    xs: Sequence[Tensor], ks: Sequence[int], factor: NormFactor, plan: ScalingPlan | None = None
) -> ScalingPlan:
    """Multiply every datum by a factor that is a function of its norm, in place.

    xs, ks: the tensors, and how many trailing dimensions of each are a datum.
    factor: the function. Data that it leaves alone are not written.
    plan: what an earlier call returned for tensors of the same shapes, dtypes and devices, the same `ks` and order.
    """
    if plan is None:
        plan = ScalingPlan(xs, ks, factor.p)
    plan.run(xs, factor)
    return plan


def _buffer(*size: Any, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory of the CPU that outlives the default device and the inference mode in which it is made."""
    with torch.inference_mode(False):
        return torch.empty(*size, dtype=dtype, device="cpu")


class ScalingPlan:
    """The bundles that `scale_by_norm_` works through, for tensors of given shapes."""

    def __init__(self, xs: Sequence[Tensor], ks: Sequence[int], p: float) -> None:
        self._p = p
        self._elsewhere: list[tuple[int, int]] = []  # (index, k) of what is complex or not on a CPU
        self._bundles: list[_Bundle] = []
        open_bundles: dict[torch.dtype, _Bundle] = {}
        alike: dict[Any, list[int]] = {}

        def add(member: _Member) -> None:
            bundle = open_bundles.get(member.dtype)
            if bundle is None or bundle.numel + member.numel > BLOCK_NUMEL:
                bundle = open_bundles[member.dtype] = _Bundle(member.dtype, p)
                self._bundles.append(bundle)
            bundle.members.append(member)
            bundle.numel += member.numel

        for i, (x, k) in enumerate(zip(xs, ks, strict=True)):
            if x.numel() == 0:
                continue
            if not is_on_cpu(x) or x.is_complex():
                self._elsewhere.append((i, k))
            elif x.numel() <= STACKED_NUMEL:
                alike.setdefault((x.shape, x.dtype, k), []).append(i)
            else:
                for index in block_indices(x.shape, k):
                    add(_Member([i], index, x[index].shape, x.dtype, k, p))
        for (shape, dtype, k), indices in alike.items():
            step = BLOCK_NUMEL // shape.numel()
            for a in range(0, len(indices), step):
                add(_Member(indices[a : a + step], (), shape, dtype, k, p))
        for bundle in self._bundles:
            bundle.lay_out()
        self._shared_out = [bundle for bundle in self._bundles if not bundle.is_large]
        self._large = [bundle for bundle in self._bundles if bundle.is_large]
        if len(self._bundles) == 1 and not self._elsewhere:
            self.run = self._bundles[0].run

    def run(self, xs: Sequence[Tensor], factor: NormFactor) -> None:
        """Scale tensors of the shapes that this was made for."""
        elsewhere = [xs[i] for i, _ in self._elsewhere]
        ks = [k for _, k in self._elsewhere]
        for i in _by_kernels.scale_by_norm_(elsewhere, ks, factor):
            x, k = elsewhere[i], ks[i]
            for block in blocks(x, k):
                if block.numel() > BLOCK_NUMEL and not block.is_complex():
                    scale_large_datum_(block, factor)
                else:
                    block.copy_(scaled_exactly(block, k, factor))
        share_out(lambda bundle: bundle.run(xs, factor), self._shared_out)
        for bundle in self._large:  # each is shared out by itself
            bundle.run(xs, factor)


class _Member:
    """A block of a tensor, or several small tensors of one shape that are stacked."""

    def __init__(
        self,
        indices: list[int],
        index: tuple[int | slice, ...],
        shape: Sequence[int],
        dtype: torch.dtype,
        k: int,
        p: float,
    ) -> None:
        self.indices = indices
        self._index = index
        self.is_part = index != ()
        self.dtype = dtype
        self.k = k
        self.stacked = len(indices) > 1
        self._take = operator.itemgetter(*indices)
        self.shape = (len(indices), *shape) if self.stacked else tuple(shape)
        self.numel = math.prod(self.shape)
        self.count = math.prod(self.shape[: len(self.shape) - k])
        self.length = self.numel // self.count
        self.piece = piece_length(self.length)
        self.summed = is_summed(dtype, p) and self.length > 1
        self.direct = self.piece == self.length and not self.summed
        self.is_large = self.length > BLOCK_NUMEL

    def lay_out(self, p: float, measured: Tensor, norms: Tensor, factors: Tensor) -> None:
        """Take places in the buffers of the bundle: for norms as they are measured, norms in float64, and factors."""
        accumulate = measured.dtype
        self._p = p
        self._norms = norms
        self._measured = measured
        # One factor is better a 0-d tensor: it does not promote a half, which would cost a temporary.
        batch = self.shape[: len(self.shape) - self.k]
        self.factors = factors.view((*batch, *(1,) * self.k) if self.count > 1 else ())
        if self.stacked:
            self.buffer = _buffer(self.shape, dtype=self.dtype)
            self.unstacked = self.buffer.unbind(0)
        self._matrix = torch.Size((self.count, self.length))
        if not (self.direct or self.summed or self.is_large):
            whole = self.length // self.piece
            self._cut = whole * self.piece
            if self._cut == self.length:
                self._matrix = torch.Size((self.count, whole, self.piece))
            self._parts = _buffer(self.count, whole + (self._cut < self.length), dtype=accumulate)
            self._whole = self._parts[:, :whole]
            self._rest = self._parts[:, whole] if self._cut < self.length else None

    def fetch(self, xs: Sequence[Tensor]) -> Tensor:
        """The tensor to work on."""
        if self.stacked:
            return torch.stack(self._take(xs), out=self.buffer)
        x = xs[self.indices[0]]
        return x[self._index] if self._index else x

    def measure(self, x: Tensor) -> None:
        """Write the norms of the data of x: direct ones as they are measured, else in float64."""
        accumulate = self._measured.dtype
        if x.shape == self._matrix:
            rows = x
        elif x.is_contiguous():
            rows = x.view(self._matrix)
        else:
            rows = as_rows(x, self.k)
            rows = x.reshape(self._matrix) if rows is None else rows.view(self._matrix)
        if self.is_large:
            self._norms.copy_(large_norm(rows[0], self._p))
        elif self.summed:
            self._norms.copy_(summed_norms(rows, self._p))
        elif self.length == 1:
            self._measured.view(rows.shape).copy_(rows).abs_()
        elif self.direct:
            torch.linalg.vector_norm(rows, self._p, 1, dtype=accumulate, out=self._measured)
        else:
            if self._rest is not None:
                torch.linalg.vector_norm(rows[:, self._cut :], self._p, 1, dtype=accumulate, out=self._rest)
                rows = rows[:, : self._cut].unflatten(1, (-1, self.piece))
            torch.linalg.vector_norm(rows, self._p, 2, dtype=accumulate, out=self._whole)
            torch.linalg.vector_norm(self._parts, self._p, 1, dtype=torch.float64, out=self._norms)


class _Bundle:
    """Blocks and stacks of one dtype whose norms become factors together."""

    def __init__(self, dtype: torch.dtype, p: float) -> None:
        self.members: list[_Member] = []
        self.numel = 0
        self.dtype = dtype
        self._p = p

    def lay_out(self) -> None:
        """Make the buffers for norms and factors, and give every member its place in them."""
        self.members.sort(key=lambda m: (not m.direct, m.stacked))
        self.is_large = self.members[0].is_large  # then it is the only one
        self._counts = [m.count for m in self.members]
        dtype = torch.promote_types(self.dtype, torch.float32)
        self._asked_about: NormFactor | None = None
        self._safe_norms = safe_range(self.dtype, self._p)
        self._safe_factors = safe_factors(self.dtype)
        directs = sum(m.count for m in self.members if m.direct)
        self._norms = _buffer(sum(self._counts), dtype=torch.float64)
        self._few_factors = array("d" if dtype == torch.float64 else "f", [0.0] * min(sum(self._counts), _FEW + 1))
        if sum(self._counts) <= _FEW:
            with torch.inference_mode(False):
                self._factors = torch.frombuffer(self._few_factors, dtype=dtype)
        else:
            self._factors = _buffer(sum(self._counts), dtype=dtype)
        lengths = [m.length for m in self.members]
        self._lengths: Tensor | int = lengths[0]
        if len(set(lengths)) > 1:
            with torch.inference_mode(False), torch.device("cpu"):
                self._lengths = torch.tensor(lengths).repeat_interleave(torch.tensor(self._counts))
        # where there is little to measure, a call less counts for more than narrower arithmetic
        if self.numel <= _LITTLE_NUMEL and directs == sum(self._counts):
            self._measured = self._norms
        else:
            self._measured = _buffer(directs, dtype=dtype)
        self._measured_norms = self._norms[:directs]
        start = 0
        for member, count in zip(self.members, self._counts, strict=True):
            place = slice(start, start + count)
            measured = self._measured[place] if member.direct else self._measured[:0]
            member.lay_out(self._p, measured, self._norms[place], self._factors[place])
            start += count
        self._single = [i for i, m in enumerate(self.members) if not m.stacked]
        self._stacks = [i for i, m in enumerate(self.members) if m.stacked]
        self._single_factors = [self.members[i].factors for i in self._single]
        stacked = [j for i in self._stacks for j in self.members[i].indices]
        self._take_stacked = operator.itemgetter(*stacked) if stacked else tuple
        self._unstacked = [part for i in self._stacks for part in self.members[i].unstacked]
        self._fetches = [m.indices for m in self.members] != [[0]] or self.members[0].is_part
        self._may_be_quick = len(self._norms) <= _FEW and isinstance(self._lengths, int)
        self._ones = [1.0] * len(self._norms)

    def _ask_about(self, factor: NormFactor) -> None:
        """Find out what a factor allows, where it is another one than at the last time."""
        # Are the factors of ordinary norms ordinary numbers too? A factor never grows with the norm.
        ends = factor.of_(torch.tensor(self._safe_norms, dtype=torch.float64, device="cpu"), self.dtype, 1)
        least, most = _extremes(ends.abs())
        low, high = self._safe_factors
        self._has_safe_factors = low <= least and most <= high
        self._unchanged_to = factor.unchanged_to
        self._is_quick = self._may_be_quick and self._has_safe_factors and factor.is_of_numbers
        self._asked_about = factor

    def run(self, xs: Sequence[Tensor], factor: NormFactor) -> None:
        """Scale the data of this bundle."""
        if self._asked_about is not factor:
            self._ask_about(factor)
        parts = [member.fetch(xs) for member in self.members] if self._fetches or len(xs) > 1 else xs
        for member, part in zip(self.members, parts, strict=True):
            member.measure(part)
        if self._measured is not self._norms and self._measured.numel():
            self._measured_norms.copy_(self._measured)
        low, high = self._safe_norms
        if self._is_quick:
            norms = self._norms.tolist()
            least, most = min(norms), max(norms)
            if low <= least and most <= high and sum(norms) >= 0:  # a NaN shows in the sum
                if most > self._unchanged_to:
                    factors = factor.of_numbers(norms, self.dtype, self.members[0].length)
                    if factors != self._ones:
                        self._few_factors[:] = array(self._few_factors.typecode, factors)
                        self._multiply_(xs, parts)
                return
        self._scale_(xs, parts, factor)

    def _scale_(self, xs: Sequence[Tensor], parts: Sequence[Tensor], factor: NormFactor) -> None:
        """Scale data whose norms are measured, however many they are, and whatever their norms."""
        norms = self._norms
        least, most = _extremes(norms)
        low, high = self._safe_norms
        ordinary = low <= least and most <= high
        if ordinary and most <= self._unchanged_to:
            return
        suspicious = None if ordinary else ~((norms >= low) & (norms <= high))
        factors = factor.of_(norms, self.dtype, self._lengths)
        if suspicious is not None or not self._has_safe_factors:
            low, high = self._safe_factors
            sizes = factors.abs()
            beyond = ~((sizes >= low) & (sizes <= high))
            suspicious = beyond if suspicious is None else suspicious | beyond
            factors.masked_fill_(suspicious, 1.0)
            for member, part, rows in zip(self.members, parts, suspicious.split(self._counts), strict=True):
                redo_(part, member.k, rows, factor)
        self._factors.copy_(factors)
        self._multiply_(xs, parts)

    def _multiply_(self, xs: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Multiply by `_factors`."""
        if self.is_large:
            multiply_large_(parts[0], self._single_factors[0])
        elif len(parts) == 1 and self._single:
            parts[0].mul_(self._single_factors[0])
        elif self._single:
            torch._foreach_mul_([parts[i] for i in self._single], self._single_factors)  # pyright: ignore
        if self._stacks:
            for i in self._stacks:
                parts[i].mul_(self.members[i].factors)
            torch._foreach_copy_(self._take_stacked(xs), self._unstacked)  # pyright: ignore


def _extremes(x: Tensor) -> tuple[float, float]:
    """The least and the greatest entry; NaN where there is one."""
    if x.numel() == 1:
        value = x.item()
        return value, value
    least, most = torch.aminmax(x)
    return least.item(), most.item()
