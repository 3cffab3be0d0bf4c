"""The inner optimizer: built from what a user gives, and what its own step may be replaced by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

OptimParams: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
InnerOptimizer: TypeAlias = Callable[..., Optimizer] | Optimizer


def built(params: OptimParams | None, InnerOpt: InnerOptimizer, kwargs: dict[str, Any]) -> Optimizer:
    """The inner optimizer."""
    if isinstance(InnerOpt, Optimizer):
        if kwargs:
            raise TypeError(f"`InnerOpt` is already an optimizer, so it cannot take the keywords {sorted(kwargs)}")
        if params is not None and _ids(params) != _ids(InnerOpt.param_groups):
            raise ValueError(
                "`InnerOpt` is already an optimizer, of other parameters than `params`: let `params` be None"
            )
        return InnerOpt
    if not callable(InnerOpt):
        raise TypeError(
            f"`InnerOpt` must be an optimizer class, a partial of one, a callable that returns an optimizer, or an "
            f"optimizer, got {InnerOpt!r}"
        )
    if params is None:
        raise TypeError("`params` may be None only when `InnerOpt` is an optimizer that has parameters already")
    inner = InnerOpt(params if isinstance(params, Tensor) else copied(params), **kwargs)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`InnerOpt` must return a torch.optim.Optimizer, but {InnerOpt!r} returned {inner!r}")
    return inner


def copied(params: Iterable[Any]) -> list[Any]:
    """`params` with every group copied, since torch fills in the dict that it is given."""
    copies = []
    for group in params:
        if isinstance(group, dict):
            group = dict(group)
            members = group.get("params")  # without them, torch says so
            if members is not None and not isinstance(members, (Tensor, set)):
                group["params"] = list(members)
        copies.append(group)
    return copies


def _ids(params: Iterable[Any]) -> set[int]:
    ids: set[int] = set()
    for p in [params] if isinstance(params, Tensor) else params:
        if isinstance(p, dict):
            ids |= _ids(p["params"])
        else:
            ids.add(id(p[1] if isinstance(p, tuple) else p))
    return ids


def is_unobserved(inner: Optimizer) -> bool:
    """Whether nobody patched the step of `inner` (a scheduler, say) or asked to be called around it."""
    return (
        "step" not in inner.__dict__
        and not inner._optimizer_step_pre_hooks
        and not inner._optimizer_step_post_hooks
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
    )


def traceable_step(inner: Optimizer) -> Callable[[Optimizer], Any] | None:
    """The step of `inner` without what breaks a graph, or None where it needs a closure or is not one of torch's."""
    if not type(inner).__module__.startswith("torch.optim.") or isinstance(inner, LBFGS):
        return None
    step: Any = type(inner).step
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step
