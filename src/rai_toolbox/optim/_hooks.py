"""The hooks that users override: what they are given, and what they must not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import batch_shape, datum_ndim, write_through


def run_hook(optim: Optimizer, hook: Callable[..., None], p: Tensor, options: Mapping[str, Any]) -> None:
    """Give a user's hook `p` and its gradient as (N, d0, ...), and see that the gradient was changed in place."""
    k = datum_ndim(p.ndim, options["param_ndim"])
    batch, shared = _batched_view(p, k)
    grad, grad_shared = None, True
    if p.grad is not None:
        if p.grad.layout is torch.strided:
            grad, grad_shared = _batched_view(write_through(p.grad), k)
        elif batch.shape == p.shape:
            grad = p.grad
        else:
            raise TypeError(
                f"{type(optim).__name__} sees a parameter of shape {tuple(p.shape)} as {tuple(batch.shape)}, and a "
                f"sparse gradient cannot be viewed so: use a dense gradient, or `param_ndim=-1`"
            )
        if grad.dtype != batch.dtype:
            batch.grad_dtype = None  # any
        batch.grad = grad
    forms = [_form(x) for x in (batch, grad)]
    batch._viewed_parameter = p  # pyright: ignore[reportAttributeAccessIssue]
    hook(param=batch, optim_group=options)
    if batch in optim.state:
        del optim.state[batch]
        raise TypeError(
            f"{type(optim).__name__}.{hook.__name__} used `self.state[param]`, but `param` is a view that is made for "
            f"each call, so nothing finds the entry again: keep what must last in `self.memory(param, name)`"
        )
    for name, x, now, form in zip(("param", "param.grad"), (batch, grad), (batch, batch.grad), forms, strict=True):
        if now is not x or _form(x) != form:
            raise ValueError(
                f"{type(optim).__name__}.{hook.__name__} replaced `{name}` by another tensor: it must change it in "
                f"place (`{name}.mul_(…)`, `{name}.copy_(…)`)"
            )
    if not shared:
        p.copy_(batch.view(p.shape))
    if grad is not None and p.grad is not None and not grad_shared:
        p.grad.copy_(grad.view(p.grad.shape))


def _form(x: Tensor | None) -> tuple[Any, ...] | None:
    """What an assignment to `x.data` would change."""
    if x is None or x.layout is not torch.strided:
        return None
    return x.data_ptr(), x.shape, x.stride()


def _batched_view(x: Tensor, k: int) -> tuple[Tensor, bool]:
    """`x` as (N, d0, ...) for a user's hook, and whether it shares the memory of `x` (else it is a copy)."""
    shape = batch_shape(x.shape, k)
    try:
        return x.detach().view(shape), True
    except RuntimeError:
        return x.detach().reshape(shape), False
