"""A step in three parts, for any tensors and any inner optimizer: change the gradients, step, change the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import datum_ndim, write_through
from rai_toolbox.optim import _sharding
from rai_toolbox.optim._memory import Noted
from rai_toolbox.optim._plans import GroupPlan, Side
from rai_toolbox.optim._random import Draws
from rai_toolbox.optim._running import Remembering
from rai_toolbox.optim._sharded_gradients import settle_gradients
from rai_toolbox.optim._shards import local_part
from rai_toolbox.optim._tensors import is_sharded, scale_and_shift_
from rai_toolbox.optim._torch_private import not_traced, sparse_values
from rai_toolbox.optim._transforms import ByNorm, Entrywise, Hook, PerDatum, Stage, Transform


class Separate:
    """Take any step, in three parts."""

    def accepts(self, plans: Sequence[GroupPlan], inner: Optimizer) -> bool:
        """Return whether this can take the step: always."""
        return True

    def take(self, plans: Sequence[GroupPlan], inner: Optimizer) -> None:
        """Take the step."""
        self.change_gradients(plans)
        inner.step()
        self.change_parameters(plans)

    @not_traced
    @torch.no_grad()
    def change_gradients(self, plans: Sequence[GroupPlan]) -> None:
        """Run the stages before the inner step. With a closure, that is part of each evaluation."""
        if any(_work(plan, plan.gradients()).sharded for plan in plans):
            settle_gradients([p for plan in plans for p in plan.params])
            for plan in plans:
                plan.grads = [p.grad for p in plan.params]
        with ExitStack() as stack:
            for draws in _sources(plans):
                stack.enter_context(draws.alike())
            _change_([(plan, plan.gradients()) for plan in plans])

    @not_traced
    @torch.no_grad()
    def change_parameters(self, plans: Sequence[GroupPlan]) -> None:
        """Run the stages after the inner step."""
        _change_([(plan, plan.parameters()) for plan in plans])

    @torch.no_grad()
    def change_parameters_at_rest(self, plans: Sequence[GroupPlan]) -> None:
        """Run the stages after the inner step for the parameters that had no gradient."""
        _change_([(plan, plan.parameters_at_rest()) for plan in plans if plan.resting])


SEPARATE = Separate()


def _sources(plans: Sequence[GroupPlan]) -> list[Draws]:
    """Return what the stages draw from, each once, in an order that is the same on every rank."""
    transforms = [s.transform for plan in plans for s in plan.before if isinstance(s.transform, PerDatum)]
    return list(dict.fromkeys(t.draws for t in transforms if t.draws is not None))


def _work(plan: GroupPlan, side: Side) -> _Work:
    work = plan.laid_out.get(side.name)
    if work is None:
        work = plan.laid_out[side.name] = _Work(side)
    return work


def _change_(sides: Sequence[tuple[GroupPlan, Side]]) -> None:
    """Run the stages of all groups. What is sharded waits until the end, and then shares its collectives."""
    jobs: list[_sharding.Job] = []
    for plan, side in sides:
        if side.stages and side.tensors:
            _work(plan, side).run(side, jobs)
    if jobs:
        _sharding.run(jobs)


class _Work:
    """The tensors of one side of a step, sorted by their layout, and what their stages have laid out for them."""

    def __init__(self, side: Side) -> None:
        self.sharded = {i: _sharding.Layout(p) for i, p in enumerate(side.params) if is_sharded(p)}
        self._sparse = [i for i, x in enumerate(side.tensors) if x.layout is not torch.strided]
        others = {*self.sharded, *self._sparse}
        self._dense = [i for i in range(len(side.tensors)) if i not in others] if others else None
        self._ks = [[datum_ndim(p.ndim, stage.param_ndim) for p in side.params] for stage in side.stages]
        self._dense_ks = [ks if self._dense is None else [ks[i] for i in self._dense] for ks in self._ks]
        self._plans: list[Any] = [None] * len(side.stages)

    def run(self, side: Side, jobs: list[_sharding.Job]) -> None:
        """Change the dense and the sparse tensors, and put jobs for the sharded ones on the list."""
        xs = side.tensors if self._dense is None else [side.tensors[i] for i in self._dense]
        if not all(map(Tensor.is_contiguous, xs)):
            for x in xs:
                write_through(x)
        for n, stage in enumerate(side.stages):
            transform = stage.transform
            if isinstance(transform, Hook):
                self._call_hook(transform, self._ks[n], side.params, jobs)
                transform = None
            elif isinstance(transform, PerDatum) and transform.drawn is not None:
                self._draw_and_change_(transform, stage, self._ks[n], side.tensors, jobs)
                continue
            if isinstance(transform, Remembering):
                self._change_what_is_remembered_(transform, stage, side, xs, jobs)
                continue
            if transform is not None and xs:
                self._plans[n] = transform.change_(xs, self._dense_ks[n], self._plans[n])
            if stage.scale != 1 or stage.bias != 0:
                scale_and_shift_(xs, stage.scale, stage.bias)
            if self._dense is not None:
                self._change_others_(transform, stage, self._ks[n], side.tensors, jobs)

    def _change_others_(
        self,
        transform: Transform | None,
        stage: Stage,
        ks: Sequence[int],
        tensors: Sequence[Tensor],
        jobs: list[_sharding.Job],
    ) -> None:
        for i in self._sparse:
            if transform is not None:
                change_sparse_(transform, tensors[i], ks[i])
            scale_and_shift_([tensors[i]], stage.scale, stage.bias)
        for i, layout in self.sharded.items():
            jobs.append(_sharding.Job(transform, tensors[i], ks[i], layout, stage.scale, stage.bias))

    def _draw_and_change_(
        self,
        transform: PerDatum,
        stage: Stage,
        ks: Sequence[int],
        tensors: Sequence[Tensor],
        jobs: list[_sharding.Job],
    ) -> None:
        """Draw in the order of the parameters, whatever the order of the work."""
        for i, (x, k) in enumerate(zip(tensors, ks, strict=True)):
            assert transform.drawn is not None
            drawn = transform.drawn()
            if i in self.sharded:
                jobs.append(_sharding.Job(drawn, x, k, self.sharded[i], stage.scale, stage.bias))
                continue
            if x.layout is torch.strided:
                drawn.change_([x], [k])
            else:
                change_sparse_(drawn, x, k)
            scale_and_shift_([x], stage.scale, stage.bias)

    def _change_what_is_remembered_(
        self, transform: Remembering, stage: Stage, side: Side, xs: Sequence[Tensor], jobs: list[_sharding.Job]
    ) -> None:
        """Run a stage that remembers something of each parameter."""
        if self._sparse:
            raise TypeError(
                "what is remembered of a parameter is dense, and a sparse gradient cannot hold it: use a dense gradient"
            )
        dense = side.params if self._dense is None else [side.params[i] for i in self._dense]
        if xs:
            transform.with_memory(stage.remembered(dense)).change_(xs)
        if stage.scale != 1 or stage.bias != 0:
            scale_and_shift_(xs, stage.scale, stage.bias)
        for i, layout in self.sharded.items():
            memory = {name: [local_part(m) for m in some] for name, some in stage.remembered([side.params[i]]).items()}
            bound = transform.with_memory(memory)
            jobs.append(_sharding.Job(bound, side.tensors[i], 0, layout, stage.scale, stage.bias))

    def _call_hook(self, hook: Hook, ks: Sequence[int], params: Sequence[Tensor], jobs: list[_sharding.Job]) -> None:
        if self.sharded and jobs:  # what comes before the hook
            _sharding.run(jobs)
            jobs.clear()
        for i, (p, k) in enumerate(zip(params, ks, strict=True)):
            if i in self.sharded:
                _sharding.run_hook(hook, p, k)
            else:
                hook.change_([p], [k])


@torch.no_grad()
def rehearse(side: Side) -> None:
    """Have users' hooks begin to remember, without a step: they change copies of parameters, and gradients of zero."""
    for stage in side.stages:
        hook = stage.transform
        if not isinstance(hook, Hook):
            continue
        for p in side.params:
            k = datum_ndim(p.ndim, stage.param_ndim)
            copied: Any = p.detach().clone()
            copied.grad = torch.zeros_like(copied)
            with torch.random.fork_rng(devices=[]):
                if is_sharded(p):
                    _sharding.run_hook(hook, copied, k, of=p)
                    continue
                copied._noted = Noted({})
                hook.change_([copied], [k])
                hook.put(p, copied._noted.first)


def change_sparse_(transform: Transform, x: Tensor, k: int) -> None:
    """Change a sparse COO tensor by its values, where that is what the mathematics says."""
    if x.layout is not torch.sparse_coo:
        raise TypeError(f"a gradient of layout {x.layout} is not supported: use a strided or a sparse COO gradient")
    if not x.is_coalesced():
        x.data = x.coalesce()
    values = sparse_values(x)
    if isinstance(transform, Entrywise):
        if not transform.keeps_zero:
            raise TypeError(
                "this clamp moves zeros, which would make a sparse gradient dense: its bounds must include 0"
            )
        transform.change_([values])
    elif k <= x.dense_dim():  # a datum is (part of) one of the dense values
        transform.change_([values], [k])
    elif k == x.ndim and isinstance(transform, ByNorm):  # zeros add nothing to a norm
        transform.change_([values], [values.ndim])
    else:
        raise TypeError(
            f"a sparse gradient with {x.sparse_dim()} sparse and {x.dense_dim()} dense dimensions cannot be changed "
            f"by {type(transform).__name__} over its last {k} dimensions: use `param_ndim` ≤ {x.dense_dim()}"
            + (" or None" if isinstance(transform, ByNorm) else "")
        )
