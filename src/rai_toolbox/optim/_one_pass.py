"""Transform, update and transform again, block by block, where the inner optimizer is plain SGD on a CPU.

A step is memory traffic: three separate passes read each gradient and parameter from memory three times, one pass over
blocks that fit the cache reads them once. Threads share out the blocks. What is computed is the same, bit for bit
(in halves, to a rounding): SGD's update of a block is `p.add_(g, alpha=-lr)`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.functional._by_kernels import length_of
from rai_toolbox.functional._large_scaling import large_norm, multiply_large_, norm_of_parts, pieces_of
from rai_toolbox.functional._layout import BLOCK_NUMEL, block_indices, datum_ndim, is_number
from rai_toolbox.functional._norms import direct_norms
from rai_toolbox.functional._per_datum import FEWEST_SHARED
from rai_toolbox.functional._scaling import STACKED_NUMEL, ScalingPlan
from rai_toolbox.kernels._machine import is_on_cpu
from rai_toolbox.kernels._norms import piece_length, safe_factors, safe_range
from rai_toolbox.kernels._threads import share_out
from rai_toolbox.optim._plans import GroupPlan
from rai_toolbox.optim._separate import SEPARATE
from rai_toolbox.optim._tensors import scale_and_shift_
from rai_toolbox.optim._torch_private import bare_step, foreach_add_, is_flattened, is_unobserved, not_traced, note_step
from rai_toolbox.optim._transforms import ByNorm, Entrywise, PerDatum, Stage, Transform


class OnePass:
    """Take the step where nobody can tell it from one in three parts."""

    def accepts(self, plans: Sequence[GroupPlan], inner: Optimizer) -> bool:
        """Return whether `inner` is plain SGD and all tensors can be worked on in place, block by block."""
        if not is_plain_sgd(inner):
            return False
        for plan in plans:
            blocks = plan.laid_out.get(OnePass)
            if blocks is None:
                blocks = plan.laid_out[OnePass] = Blocks(plan)
            if not blocks.fit(plan):
                return False
        return True

    @not_traced
    @torch.no_grad()
    def take(self, plans: Sequence[GroupPlan], inner: Optimizer) -> None:
        """Take the step."""
        for plan in plans:
            plan.laid_out[OnePass].step(plan)
            if plan.resting:
                SEPARATE.change_parameters_at_rest([plan])
        note_step(inner)


def is_plain_sgd(inner: Optimizer) -> bool:
    """Return whether `inner` is plain SGD, with no hooks and no patches: its step is `p.add_(grad, alpha=-lr)`."""
    return (
        type(inner) is SGD
        and is_unobserved(inner)
        and bare_step(inner) is not None
        and not torch.compiler.is_compiling()
        and all(map(_is_plain_group, inner.param_groups))
    )


def _is_plain_group(group: dict[str, Any]) -> bool:
    return (
        (type(group["lr"]) is float or is_number(group["lr"]))
        and not (group["momentum"] or group["weight_decay"] or group["maximize"] or group["differentiable"])
        and group["foreach"] is None  # else the user chose how SGD is to step
        and group["fused"] is None
    )


class Blocks:
    """The blocks of the parameters of a plan and of their gradients."""

    def __init__(self, plan: GroupPlan) -> None:
        params, stages = plan.params, [*plan.before, *plan.after]
        self._possible = all(_has_blocks(p, g) for p, g in zip(params, plan.grads, strict=True)) and all(
            stage.works_on_any_part for stage in stages
        )
        bundles, self._cuts = _bundles(params, stages) if self._possible else ([], {})
        self._is_cut = len(bundles) > 1
        self._bundles = [b for b in bundles if not b.large]
        self._large = [b for b in bundles if b.large]
        self._addresses: list[int] = []
        self._searches = any(isinstance(s.transform, PerDatum) for s in stages)

    def fit(self, plan: GroupPlan) -> bool:
        """Return whether the gradients can be worked on in place, block by block."""
        if not (self._possible and all(map(Tensor.is_contiguous, plan.grads))):
            return False
        if not self._is_cut:
            return True
        whole_memory = all(plan.params[i].is_contiguous() for i, cut in self._cuts.items() if cut.shape)
        return whole_memory and self._share_no_memory([*plan.grads, *plan.params])

    def _share_no_memory(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether no block of a gradient or parameter is changed by the work on another."""
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

    def step(self, plan: GroupPlan) -> None:
        """Change the gradients by the stages `before`, update, and change the parameters by the stages `after`."""
        lr, before, after = float(plan.group["lr"]), plan.before, plan.after
        grads, params = plan.grads, plan.params
        if self._cuts:
            grads, params = self._with_views(grads), self._with_views(params)
        if len(self._bundles) == 1 and not self._searches:
            self._bundles[0].step(grads, params, lr, before, after)
        elif self._bundles:
            share_out(
                lambda bundle: bundle.step(grads, params, lr, before, after),
                self._bundles,
                FEWEST_SHARED if self._searches else 2,
                one_thread_each=self._searches,
            )
        for bundle in self._large:  # each is shared out by itself
            bundle.step(grads, params, lr, before, after)

    def _with_views(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors, those that are cut as what they are cut as."""
        views = list(xs)
        for i, cut in self._cuts.items():
            if cut.shape:
                views[i] = xs[i].view(cut.shape)
        return views


def _extent(x: Tensor) -> int:
    """Return how many bytes of memory a tensor reaches over, from its first entry on."""
    if x.is_contiguous():
        return x.numel() * x.element_size()
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _has_blocks(p: Tensor, grad: Tensor) -> bool:
    return (
        type(p) in (Tensor, torch.nn.Parameter)
        and is_on_cpu(p, grad)
        and p.layout is grad.layout is torch.strided
        and p.is_floating_point()
        and p.dtype == grad.dtype
        and p.shape == grad.shape
        and not is_flattened(p)
    )


class _Cut:
    """How a large tensor is cut between data.

    shape: () or, for a contiguous tensor, the shape as which it is cut along its first dimension: (data, pieces,
        entries), (data, entries) or (entries,). So an operator that measures needs no view of its own.
    indices: of the blocks, in the tensor or in its view of that shape.
    numels: how many entries they have.
    """

    def __init__(self, p: Tensor, k: int, may_be_viewed: bool) -> None:
        length = math.prod(p.shape[p.ndim - k :])
        self.shape: tuple[int, ...] = ()
        if may_be_viewed and length <= BLOCK_NUMEL:
            count, piece = p.numel() // length, piece_length(length)
            self.shape = (count, length // piece, piece) if piece < length and length % piece == 0 else (count, length)
            if k == 0:
                self.shape = (count,)
            p = p.view(self.shape)
            k = len(self.shape) - 1
        self.indices = list(block_indices(p.shape, k, BLOCK_NUMEL))
        self.numels = [p[index].numel() for index in self.indices]


def _bundles(params: Sequence[Tensor], stages: Sequence[Stage]) -> tuple[list[_Bundle], dict[int, _Cut]]:
    """Cut large parameters between data, and put small ones together; how is returned by their indices."""
    bundles: list[_Bundle] = []
    cuts: dict[int, _Cut] = {}
    room: dict[torch.dtype, int] = {}
    current: dict[torch.dtype, _Bundle] = {}
    acting = [s for s in stages if s.transform is not None and not isinstance(s.transform, Entrywise)]
    for i in _in_order(params, [s.param_ndim for s in stages if isinstance(s.transform, PerDatum)]):
        p = params[i]
        ks = [datum_ndim(p.ndim, s.param_ndim) for s in stages]
        uncut = max((datum_ndim(p.ndim, s.param_ndim) for s in acting), default=0)
        alike = all(datum_ndim(p.ndim, s.param_ndim) == uncut for s in acting)
        indices, numels = [()], [p.numel()]
        if p.numel() > BLOCK_NUMEL and uncut < p.ndim:
            by_norm = all(isinstance(s.transform, ByNorm) for s in acting)
            cut = cuts[i] = _Cut(p, uncut, alike and by_norm and p.is_contiguous())
            ks = [len(cut.shape) - 1] * len(ks) if cut.shape else ks
            indices, numels = cut.indices, cut.numels
        for index, numel in zip(indices, numels, strict=True):
            if numel > room.get(p.dtype, 0):
                current[p.dtype] = _Bundle()
                bundles.append(current[p.dtype])
                room[p.dtype] = BLOCK_NUMEL
            current[p.dtype].add(i, index, ks)
            current[p.dtype].large = alike and numel > BLOCK_NUMEL
            room[p.dtype] -= numel
    return bundles, cuts


def _in_order(params: Sequence[Tensor], searched: Sequence[int | None]) -> list[int]:
    """The indices of tensors that are not empty; where there is more than a block, small ones come last, together.

    searched: the `param_ndim` of stages that search. Data of one length are neighbours: a block is searched length by
        length, and the shortest, which take longest, come first.
    """
    indices = [i for i, p in enumerate(params) if p.numel()]
    if sum(map(Tensor.numel, params)) > BLOCK_NUMEL:
        ks = [[datum_ndim(p.ndim, k) for k in searched] for p in params]
        lengths = [[length_of(p, k) for k in some] for p, some in zip(params, ks, strict=True)]
        indices.sort(key=lambda i: (params[i].numel() <= STACKED_NUMEL, lengths[i]))
    return indices


class _Bundle:
    """Blocks that are worked on together."""

    def __init__(self) -> None:
        self.large = False  # one datum that does not fit the cache
        self._whole = True  # all tensors, none cut
        self._places: list[tuple[int, tuple[int | slice, ...]]] = []
        self._ks: list[list[int]] = []  # for each stage, for each block
        self._plans: dict[int, ScalingPlan | None] = {}

    def add(self, i: int, index: tuple[int | slice, ...], ks: list[int]) -> None:
        """Add the block `index` of the tensor `i`, a datum of which has `ks` dimensions, one for each stage."""
        self._whole = self._whole and not index and i == len(self._places)
        self._places.append((i, index))
        if not self._ks:
            self._ks = [[] for _ in ks]
        for some, k in zip(self._ks, ks, strict=True):
            some.append(k)

    def step(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        lr: float,
        before: Sequence[Stage],
        after: Sequence[Stage],
    ) -> None:
        """Work on these blocks of `grads` and `params`."""
        if self._whole and len(self._places) == len(params):
            gs, ps = grads, params
        else:
            gs = [grads[i][index] if index else grads[i] for i, index in self._places]
            ps = [params[i][index] if index else params[i] for i, index in self._places]
        if self.large and gs[0].is_contiguous() and ps[0].is_contiguous():  # else they have not the same pieces
            self._step_large(gs[0], ps[0], lr, before, after)
            return
        for n, stage in enumerate(before):
            self._apply_(stage, n, gs)
        if len(ps) == 1:
            ps[0].add_(gs[0], alpha=-lr)
        else:
            foreach_add_(ps, gs, alpha=-lr)
        for n, stage in enumerate(after, len(before)):
            self._apply_(stage, n, ps)

    def _apply_(self, stage: Stage, n: int, xs: Sequence[Tensor]) -> None:
        if stage.transform is not None:
            self._plans[n] = stage.transform.change_(xs, self._ks[n], self._plans.get(n))
        if stage.scale != 1 or stage.bias != 0:
            scale_and_shift_(xs, stage.scale, stage.bias)

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
                scale_and_shift_([g_piece], before[whole].scale, before[whole].bias)
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
        stage.transform.change_([piece])
    scale_and_shift_([piece], stage.scale, stage.bias)


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
