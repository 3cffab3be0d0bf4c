"""A transform over a list of tensors, whatever they are: dense, sparse or sharded."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.functional._layout import blocks, datum_ndim, write_through
from rai_toolbox.functional._scaling import ScalingPlan, scale_by_norm_
from rai_toolbox.optim._transforms import ByNorm, Entrywise, PerDatum, Transform

_form = operator.attrgetter("dtype", "device", "shape")


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor (asked without importing torch.distributed.tensor, which takes a second)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def together() -> AbstractContextManager[None]:
    """A context in which sharded tensors share their collectives: they are changed at its end."""
    if "torch.distributed.tensor" not in sys.modules:
        return nullcontext()
    from rai_toolbox.optim import _sharding

    return _sharding.together()


def settle_gradients(params: Sequence[Tensor]) -> None:
    """Carry out the sums that are pending in gradients of sharded parameters; `param.grad` is then another tensor."""
    if "torch.distributed.tensor" in sys.modules and any(map(is_sharded, params)):
        from rai_toolbox.optim import _sharding

        _sharding.settle_gradients(params)


class Memo:
    """What a list of tensors looked like, so that the next step need not look again."""

    def __init__(self, owners: Sequence[Tensor], tensors: Sequence[Tensor], param_ndim: int | None) -> None:
        self._owners = list(owners)
        self._forms = list(map(_form, tensors))
        self._param_ndim = param_ndim
        self.ks = [datum_ndim(p.ndim, param_ndim) for p in owners]
        self.sharded = any(map(is_sharded, owners))
        self.plans: dict[float, ScalingPlan] = {}  # by the order of the norm

    def holds_for(self, owners: Sequence[Tensor], tensors: Sequence[Tensor], param_ndim: int | None) -> bool:
        """Whether these are the parameters and the `param_ndim` that were looked at, unmoved and uncast."""
        return (
            param_ndim == self._param_ndim
            and len(owners) == len(self._owners)
            and all(map(operator.is_, owners, self._owners))
            and all(map(operator.eq, map(_form, tensors), self._forms))
        )


def apply_(
    transform: Transform,
    tensors: Sequence[Tensor],
    param_ndim: int | None,
    owners: Sequence[Tensor] | None = None,
    memo: Memo | None = None,
) -> Memo:
    """Change every tensor in place; the trailing `param_ndim` dimensions of each are one datum.

    Parameters
    ----------
    transform, tensors, param_ndim
        What to do, to what.
    owners : sequence of Tensor, optional
        The parameters whose values or gradients the tensors are. Default: the tensors.
    memo : Memo, optional
        What an earlier call returned.

    Returns
    -------
    Memo
        For the next call.
    """
    owners = tensors if owners is None else owners
    if memo is None or not memo.holds_for(owners, tensors, param_ndim):
        memo = Memo(owners, tensors, param_ndim)
    if memo.sharded or any(x.layout is not torch.strided for x in tensors):
        _apply_one_kind_at_a_time_(transform, tensors, param_ndim)
    elif tensors:
        xs = [x if x.is_contiguous() else write_through(x) for x in tensors]
        plan = apply_dense_(
            transform, xs, memo.ks, memo.plans.get(transform.p) if isinstance(transform, ByNorm) else None
        )
        if isinstance(transform, ByNorm) and plan is not None:
            memo.plans[transform.p] = plan
    return memo


def _apply_one_kind_at_a_time_(transform: Transform, tensors: Sequence[Tensor], param_ndim: int | None) -> None:
    if isinstance(transform, PerDatum) and transform.drawn is not None:
        for x in tensors:  # draw in the order of the parameters, whatever the order of the work
            _apply_one_kind_at_a_time_(transform.drawn(), [x], param_ndim)
        return
    dense: list[Tensor] = []
    sharded: list[Tensor] = []
    for x in tensors:
        if x.layout is not torch.strided:
            _apply_to_sparse_(transform, x, datum_ndim(x.ndim, param_ndim))
        else:
            (sharded if is_sharded(x) else dense).append(x)
    if sharded:
        from rai_toolbox.optim import _sharding

        _sharding.apply_(transform, sharded, param_ndim)
    if dense:
        apply_dense_(transform, [write_through(x) for x in dense], [datum_ndim(x.ndim, param_ndim) for x in dense])


def apply_dense_(
    transform: Transform, xs: Sequence[Tensor], ks: Sequence[int], plan: ScalingPlan | None = None
) -> ScalingPlan | None:
    """Change dense tensors in place; the last k dimensions of each are one datum. Returns a plan for the next time."""
    if isinstance(transform, Entrywise):
        transform.apply_(xs)
    elif isinstance(transform, ByNorm):
        return scale_by_norm_(xs, ks, transform.factor, plan)
    elif transform.of_all_ is not None and len(xs) > 1:
        transform.of_all_(xs, ks)
    else:
        for x, k in zip(xs, ks, strict=True):
            transform.apply_(x, k)
    return None


def scale_and_shift_(tensors: Sequence[Tensor], scale: float, bias: float) -> None:
    """Multiply every tensor by `scale`, then add `bias`, in place and in one pass."""
    if (scale != 1 or bias != 0) and any(map(is_sharded, tensors)):
        from rai_toolbox.optim import _sharding

        # A transform like any other, so that it waits for its turn.
        shift = Entrywise(lambda parts: scale_and_shift_(parts, scale, bias))
        _sharding.apply_(shift, [x for x in tensors if is_sharded(x)], None)
        tensors = [x for x in tensors if not is_sharded(x)]
    if bias == 0:
        if scale != 1:
            for x in tensors:
                (x._values() if x.layout is torch.sparse_coo else x).mul_(scale)
        return
    for x in tensors:
        if x.layout is not torch.strided:
            raise TypeError(
                "`grad_bias` would make a sparse gradient dense: leave it 0 for parameters with sparse gradients"
            )
        if scale == 1:
            x.add_(bias)
        elif x.device.type == "cpu":  # rounded twice, as by hand: one `add` with `alpha` would round once
            for block in blocks(x, 0):
                block.mul_(scale).add_(bias)
        else:
            torch.add(x.new_full((), bias), x, alpha=scale, out=x)


def _apply_to_sparse_(transform: Transform, x: Tensor, k: int) -> None:
    """Change a sparse COO tensor by its values, where that is what the mathematics says."""
    name = type(transform).__name__
    if x.layout is not torch.sparse_coo:
        raise TypeError(f"a gradient of layout {x.layout} is not supported: use a strided or a sparse COO gradient")
    if not x.is_coalesced():
        x.data = x.coalesce()
    values: Any = x._values()
    if isinstance(transform, Entrywise):
        if not transform.keeps_zero:
            raise TypeError(
                "this clamp moves zeros, which would make a sparse gradient dense: its bounds must include 0"
            )
        transform.apply_([values])
    elif k <= x.dense_dim():  # a datum is (part of) one of the dense values
        apply_dense_(transform, [values], [k])
    elif k == x.ndim and isinstance(transform, ByNorm):  # zeros add nothing to a norm
        apply_dense_(transform, [values], [values.ndim])
    else:
        raise TypeError(
            f"a sparse gradient with {x.sparse_dim()} sparse and {x.dense_dim()} dense dimensions cannot be changed "
            f"by {name} over its last {k} dimensions: use `param_ndim` ≤ {x.dense_dim()}"
            + (" or None" if isinstance(transform, ByNorm) else "")
        )


def has_nonzero(x: Tensor) -> bool:
    """Whether any entry is not zero (NaN is not)."""
    x = x._values() if x.layout is torch.sparse_coo else x
    return bool(x.any())
