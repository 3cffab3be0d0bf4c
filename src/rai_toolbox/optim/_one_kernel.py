"""Transform, update and transform again in one pass, by a kernel: on a GPU, around plain SGD or Frank-Wolfe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._by_kernels import length_of
from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.kernels import _rows
from rai_toolbox.kernels._changes import NOTHING, Change, Kind, by_factor
from rai_toolbox.kernels._machine import all_have_kernels, has_kernels
from rai_toolbox.optim._frank_wolfe_step import shares, takes_bare_steps
from rai_toolbox.optim._one_pass import is_plain_sgd
from rai_toolbox.optim._plans import GroupPlan
from rai_toolbox.optim._separate import SEPARATE
from rai_toolbox.optim._tensors import scale_and_shift_
from rai_toolbox.optim._torch_private import is_flattened, not_traced, note_step
from rai_toolbox.optim._transforms import ByNorm, Entrywise, Stage


class OneKernel:
    """Take the step where a kernel does the last change of the gradients, the update, and what follows it."""

    def accepts(self, plans: Sequence[GroupPlan], inner: Optimizer) -> bool:
        """Return whether `inner` is plain SGD or Frank-Wolfe and there are kernels for all tensors."""
        for plan in plans:
            if plan.params:
                if not has_kernels(plan.params[0]):  # asked first: on a CPU it is the only question
                    return False
                return (is_plain_sgd(inner) or takes_bare_steps(inner)) and all(map(_fits, plans))
        return False

    @not_traced
    @torch.no_grad()
    def take(self, plans: Sequence[GroupPlan], inner: Optimizer) -> None:
        """Take the step."""
        for plan in plans:
            for which, keep, lr in _updates(plan, inner):
                _step(plan, which, keep, lr)
            if plan.resting:
                SEPARATE.change_parameters_at_rest([plan])
        note_step(inner)


def _updates(plan: GroupPlan, inner: Optimizer) -> list[tuple[list[int], float, float]]:
    """Return indices of parameters, and the numbers of the update p ← keep·p - lr·g that they have in common."""
    if is_plain_sgd(inner):
        return [(which, 1.0, float(plan.group["lr"])) for which in _alike(plan, range(len(plan.params)))]
    indices = {id(p): i for i, p in enumerate(plan.params)}
    return [
        (which, keep, lr)
        for params, keep, lr in shares(inner, plan.group)
        for which in _alike(plan, [indices[id(p)] for p in params])
    ]


def _alike(plan: GroupPlan, which: Iterable[int]) -> list[list[int]]:
    """Return the indices of parameters of each dtype and device; not of empty ones."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i in which:
        p = plan.params[i]
        if p.numel():
            kinds.setdefault((p.dtype, p.device), []).append(i)
    return list(kinds.values())


def _fits(plan: GroupPlan) -> bool:
    tensors = [*plan.params, *plan.grads]
    return (
        all(stage.works_on_any_part for stage in (*plan.before, *plan.after))
        and not any(map(is_flattened, plan.params))
        and all(p.dtype == g.dtype and p.shape == g.shape for p, g in zip(plan.params, plan.grads, strict=True))
        and all(
            all_have_kernels([x[i] for i in which])
            for which in _alike(plan, range(len(plan.params)))
            for x in (plan.params, plan.grads)
        )
        and len({x.untyped_storage()._cdata for x in tensors if x.numel()}) == sum(x.numel() > 0 for x in tensors)
    )


def _change_of(stage: Stage) -> Change | None:
    """Return what a kernel does in the place of a stage, or None where there is none."""
    t, scale, bias = stage.transform, float(stage.scale), float(stage.bias)
    if t is None:
        return Change(scale=scale, bias=bias)
    if isinstance(t, ByNorm):
        return by_factor(t.factor, scale, bias)
    if isinstance(t, Entrywise):
        if t.kind == "sign":
            return Change(Kind.SIGN, scale=scale, bias=bias)
        low, high = -math.inf if t.low is None else t.low, math.inf if t.high is None else t.high
        return Change(Kind.CLAMP, low=float(low), high=float(high), scale=scale, bias=bias)
    return None


def _step(plan: GroupPlan, which: list[int], keep: float, lr: float) -> None:
    grads, params = [plan.grads[i] for i in which], [plan.params[i] for i in which]
    before, after = list(plan.before), list(plan.after)
    change = _change_of(before[-1]) if before else None
    last = before.pop() if change is not None else None
    then = _change_of(after[0]) if after else None
    ndims = set() if last is None or not (change or NOTHING).by_norm else {last.param_ndim}
    if then is not None and not _may_follow(then, after[0], ndims):
        then = None
    if then is not None:
        ndims |= {after[0].param_ndim} if then.by_norm else set()
        after.pop(0)
    for stage in before:
        _change_(stage, grads)
    ndim = next(iter(ndims), None)
    lengths = [length_of(p, datum_ndim(p.ndim, ndim)) for p in params]
    _rows.step_(grads, params, lengths, change or NOTHING, keep, lr, then or NOTHING)
    for stage in after:
        _change_(stage, params)


def _may_follow(then: Change, stage: Stage, ndims: set[int | None]) -> bool:
    """Return whether the kernel that updates can also make this change of the parameters."""
    if then.scale != 1 or then.bias != 0 or then.kind in (Kind.SIGN, Kind.NORMALIZE):
        return False
    return then.kind is not Kind.BALL or (then.order == 2 and then.factor_scale == 1 and ndims <= {stage.param_ndim})


def _change_(stage: Stage, xs: Sequence[Tensor]) -> None:
    t = stage.transform
    if t is not None:
        t.change_(xs, [datum_ndim(x.ndim, stage.param_ndim) for x in xs])  # pyright: ignore[reportAttributeAccessIssue]
    if stage.scale != 1 or stage.bias != 0:
        scale_and_shift_(xs, stage.scale, stage.bias)
