"""Transform, update and transform again, block by block, where the inner optimizer is plain SGD on a CPU.

A step is memory traffic: three separate passes read each gradient and parameter from memory three times, one pass over
blocks that fit the cache reads them once. Threads share out the blocks. What is computed is the same, bit for bit:
SGD's update of a block is `p.add_(g, alpha=-lr)`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.functional._layout import BLOCK_NUMEL, block_indices, datum_ndim
from rai_toolbox.functional._norms import direct_norms, safe_factors, safe_range
from rai_toolbox.functional._per_datum import FEWEST_SHARED
from rai_toolbox.functional._scaling import ScalingPlan, large_norm, multiply_large_, norm_of_parts, pieces_of
from rai_toolbox.kernels._threads import share_out
from rai_toolbox.optim import _engine
from rai_toolbox.optim._inner import bare_step, is_unobserved
from rai_toolbox.optim._transforms import ByNorm, Entrywise, PerDatum, Transform


@dataclasses.dataclass(frozen=True)
class Stage:
    """One transform of the gradients or of the parameters of a group, and the scale and the bias that follow it."""

    transform: Transform | None
    param_ndim: int | None
    scale: float = 1.0
    bias: float = 0.0


_dtype_of = operator.attrgetter("dtype")
_shape_of = operator.attrgetter("shape")
_is_sparse = operator.attrgetter("is_sparse")
_is_on_cpu = operator.attrgetter("is_cpu")


def is_plain_sgd(inner: Optimizer) -> bool:
    """Whether nobody could tell the step of `inner` from `p.add_(grad, alpha=-lr)`."""
    return (
        type(inner) is SGD
        and is_unobserved(inner)
        and bare_step(inner) is not None
        and not torch.compiler.is_compiling()
        and all(map(_is_plain_group, inner.param_groups))
    )


def _is_plain_group(group: dict[str, Any]) -> bool:
    return (
        isinstance(group["lr"], float)
        and not (group["momentum"] or group["weight_decay"] or group["maximize"] or group["differentiable"])
        and group["foreach"] is None  # else the user chose how SGD is to step
        and group["fused"] is None
    )


class OnePass:
    """The blocks of one group of parameters, and what each needs to be worked on."""

    def __init__(self, params: Sequence[Tensor], stages: Sequence[Stage]) -> None:
        self._params = list(params)
        self._signature = _signature(stages)
        self.possible = all(
            type(p) in (Tensor, torch.nn.Parameter)
            and p.device.type == "cpu"
            and p.layout is torch.strided
            and p.is_floating_point()
            and not getattr(p, "_fsdp_flattened", False)
            for p in params
        ) and all(not isinstance(s.transform, PerDatum) or s.transform.alike for s in stages)
        if self.possible:
            self._dtypes = list(map(_dtype_of, params))
            self._shapes = list(map(_shape_of, params))
            bundles = _bundles(params, stages)
            self._is_cut = len(bundles) > 1
            self._bundles = [b for b in bundles if not b.large]
            self._large = [b for b in bundles if b.large]
            self._addresses: list[int] = []

    def holds_for(self, params: Sequence[Tensor], stages: Sequence[Stage]) -> bool:
        """Whether these are the parameters and the kinds of transforms that it was made for."""
        return (
            len(params) == len(self._params)
            and all(map(operator.is_, params, self._params))
            and _signature(stages) == self._signature
        )

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Whether the gradients can be worked on in place, block by block."""
        return (
            self.possible
            and list(map(_shape_of, grads)) == self._shapes
            and all(map(operator.is_, map(_dtype_of, grads), self._dtypes))
            and all(map(_is_on_cpu, grads))  # a model may have been moved
            and not any(map(_is_sparse, grads))
            and all(map(Tensor.is_contiguous, grads))
            and (not self._is_cut or self._share_no_memory(grads))
        )

    def _share_no_memory(self, grads: Sequence[Tensor]) -> bool:
        """Whether no block of a gradient or parameter is changed by the work on another."""
        tensors = [*grads, *self._params]
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self._addresses:
            end = 0
            for address, x in sorted(zip(addresses, tensors, strict=True), key=operator.itemgetter(0)):
                if x.numel():
                    if address < end:
                        return False
                    end = address + _extent(x)
            self._addresses = addresses
        return True

    def step(self, grads: Sequence[Tensor], lr: float, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Change the gradients by the stages `before`, update, and change the parameters by the stages `after`."""
        fewest = FEWEST_SHARED if any(isinstance(s.transform, PerDatum) for s in (*before, *after)) else 2
        share_out(lambda bundle: bundle.step(grads, self._params, lr, before, after), self._bundles, fewest)
        for bundle in self._large:  # each is shared out by itself
            bundle.step(grads, self._params, lr, before, after)


def _extent(x: Tensor) -> int:
    """How many bytes of memory a tensor reaches over, from its first entry on."""
    if x.is_contiguous():
        return x.numel() * x.element_size()
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _signature(stages: Sequence[Stage]) -> tuple[Any, ...]:
    return tuple(
        (type(s.transform), s.transform.p if isinstance(s.transform, ByNorm) else None, s.param_ndim) for s in stages
    )


def _bundles(params: Sequence[Tensor], stages: Sequence[Stage]) -> list[_Bundle]:
    """Cut large parameters between data, and put small ones together."""
    bundles: list[_Bundle] = []
    room: dict[torch.dtype, int] = {}
    current: dict[torch.dtype, _Bundle] = {}
    acting = [s for s in stages if s.transform is not None and not isinstance(s.transform, Entrywise)]
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue
        uncut = max((datum_ndim(p.ndim, s.param_ndim) for s in acting), default=0)
        for index in block_indices(p.shape, uncut, BLOCK_NUMEL):
            block = p[index] if index else p
            if block.numel() > room.get(p.dtype, 0):
                current[p.dtype] = _Bundle()
                bundles.append(current[p.dtype])
                room[p.dtype] = BLOCK_NUMEL
            current[p.dtype].add(i, index, [datum_ndim(p.ndim, s.param_ndim) for s in stages])
            current[p.dtype].large = block.numel() > BLOCK_NUMEL and block.is_contiguous()
            room[p.dtype] -= block.numel()
    return bundles


class _Bundle:
    """Blocks that are worked on together."""

    def __init__(self) -> None:
        self._whole = True  # all tensors, none cut
        self.large = False  # one datum that does not fit the cache
        self._places: list[tuple[int, tuple[int | slice, ...]]] = []
        self._ks: list[list[int]] = []  # for each block, for each stage
        self._plans: dict[int, ScalingPlan | None] = {}

    def add(self, i: int, index: tuple[int | slice, ...], ks: list[int]) -> None:
        """Add the block `index` of the parameter `i`."""
        self._whole = self._whole and not index and i == len(self._places)
        self._places.append((i, index))
        self._ks.append(ks)

    def step(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        lr: float,
        before: Sequence[Stage],
        after: Sequence[Stage],
    ) -> None:
        """Work on these blocks of `grads` and `params`."""
        gs, ps = self._blocks(grads), self._blocks(params)
        if self.large and ps[0].is_contiguous():  # else its pieces are not those of the gradient
            self._step_large(gs[0], ps[0], lr, before, after)
            return
        for n, stage in enumerate(before):
            self._apply_(stage, n, gs)
        torch._foreach_add_(ps, gs, alpha=-lr)  # pyright: ignore
        for n, stage in enumerate(after, len(before)):
            self._apply_(stage, n, ps)

    def _blocks(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(self._places) == len(xs) and self._whole:
            return xs
        return [xs[i][index] if index else xs[i] for i, index in self._places]

    def _apply_(self, stage: Stage, n: int, xs: Sequence[Tensor]) -> None:
        if stage.transform is not None:
            self._plans[n] = _engine.apply_dense_(stage.transform, xs, [ks[n] for ks in self._ks], self._plans.get(n))
        _engine.scale_and_shift_(xs, stage.scale, stage.bias)

    def _step_large(self, g: Tensor, p: Tensor, lr: float, before: Sequence[Stage], after: Sequence[Stage]) -> None:
        """Work on one datum by pieces: a norm is measured first, and applied in the pass that updates."""
        whole = next((n for n in reversed(range(len(before))) if not _by_piece(before[n])), -1)
        for n in range(whole):
            self._apply_(before[n], n, [g])
        factor = None
        if whole >= 0:
            factor = _large_factor(before[whole].transform, g)
            if factor is None:
                self._apply_(dataclasses.replace(before[whole], scale=1.0, bias=0.0), whole, [g])
        by_piece = next((n for n, stage in enumerate(after) if not _by_piece(stage)), len(after))
        measured = after[by_piece].transform if by_piece < len(after) else None

        def update(both: tuple[Tensor, Tensor]) -> Tensor:
            g_piece, p_piece = both
            if factor is not None:
                g_piece.mul_(factor)
            if whole >= 0:
                _engine.scale_and_shift_([g_piece], before[whole].scale, before[whole].bias)
            for stage in before[whole + 1 :]:
                _piece_stage_(stage, g_piece)
            p_piece.add_(g_piece, alpha=-lr)
            for stage in after[:by_piece]:
                _piece_stage_(stage, p_piece)
            return direct_norms(p_piece, 1, measured.p) if isinstance(measured, ByNorm) else p_piece

        norms = share_out(update, list(zip(pieces_of(g), pieces_of(p), strict=True)))
        rest = by_piece
        if isinstance(measured, ByNorm):
            factor = _large_factor(measured, p, norm_of_parts(norms, measured.p))
            if factor is not None:
                if factor.item() != 1:
                    multiply_large_(p, factor)
                rest += 1
        for n in range(rest, len(after)):
            self._apply_(after[n], len(before) + n, [p])


def _by_piece(stage: Stage) -> bool:
    return stage.transform is None or isinstance(stage.transform, Entrywise)


def _piece_stage_(stage: Stage, piece: Tensor) -> None:
    if isinstance(stage.transform, Entrywise):
        stage.transform.apply_([piece])
    _engine.scale_and_shift_([piece], stage.scale, stage.bias)


def _large_factor(transform: Transform | None, datum: Tensor, norm: Tensor | None = None) -> Tensor | None:
    """The one factor of a datum, 0-d, or None where only the exact formula will do."""
    if not isinstance(transform, ByNorm):
        return None
    norm = large_norm(datum.view(-1), transform.p) if norm is None else norm
    low, high = safe_range(datum.dtype, transform.p)
    if not low <= norm.item() <= high:
        return None
    factor = transform.factor.of_(norm, datum.dtype, datum.numel())
    low, high = safe_factors(datum.dtype)
    if not low <= abs(factor.item()) <= high:
        return None
    return factor.to(torch.promote_types(datum.dtype, torch.float32)).view(())
