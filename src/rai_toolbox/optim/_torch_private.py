"""All that the optimizers use of torch that torch does not document: with a new torch, this is the file to look at.

`tests/optim/test_torch_private.py` names each of these and says what is expected of it.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

# Operators on lists of tensors.
foreach_add_: Any = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_clamp_max_: Any = torch._foreach_clamp_max_  # pyright: ignore[reportPrivateImportUsage]
foreach_clamp_min_: Any = torch._foreach_clamp_min_  # pyright: ignore[reportPrivateImportUsage]
foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_lerp_: Any = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
foreach_mul_: Any = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
foreach_sign_: Any = torch._foreach_sign_  # pyright: ignore[reportPrivateImportUsage]
foreach_zero_: Any = torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]

# A decorator: the function runs as it is, also under torch.compile. (torch.compiler.disable would import the compiler
# when we are imported.)
not_traced: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]

STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
HOOK_TABLES = (
    *STEP_HOOKS,
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

# What a scheduler sets on an optimizer whose step it counts.
SCHEDULERS_MARK = "_opt_called"

# The code of the decorator of `Optimizer.step`.
_DECORATED = _use_grad_for_differentiable(lambda _: None).__code__


def prepare_optimizer(optim: Optimizer) -> None:
    """Set on an optimizer what `Optimizer.__init__` sets beside groups, state and defaults."""
    for table in HOOK_TABLES:
        optim.__dict__.setdefault(table, OrderedDict())
    optim._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportAttributeAccessIssue]
    optim._patch_step_function()


def has_step_hooks(optim: Optimizer) -> bool:
    """Return whether somebody asked to be called around the steps of `optim`."""
    return bool(optim._optimizer_step_pre_hooks or optim._optimizer_step_post_hooks)


def is_unobserved(inner: Optimizer) -> bool:
    """Return whether nobody patched the step of `inner` or asked to be called around it.

    A learning rate scheduler, which only notes that a step was taken, does not count: see `note_step`.
    """
    patched = inner.__dict__.get("step")
    return (
        (patched is None or _counts_for_a_scheduler(inner, patched))
        and not (inner._optimizer_step_pre_hooks or inner._optimizer_step_post_hooks)
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
    )


def note_step(inner: Optimizer) -> None:
    """Do what a scheduler's patch of the step of `inner` does beside calling it."""
    if "step" in inner.__dict__:
        setattr(inner, SCHEDULERS_MARK, True)


def _counts_for_a_scheduler(inner: Optimizer, patched: Any) -> bool:
    return getattr(patched, "_wrapped_by_lr_sched", False) and getattr(patched, "__wrapped__", None) is type(inner).step


def bare_step(inner: Optimizer) -> Callable[[Optimizer], Any] | None:
    """Return the step that torch wrote for the class of `inner`, without its decorators.

    None if the class is not one of torch's, if somebody replaced or wrapped its step, or if a step needs a closure.
    """
    if not type(inner).__module__.startswith("torch.optim."):
        return None
    step: Any = type(inner).step
    if getattr(step, "hooked", None) is True:  # torch wraps the step of a class when it builds the first of it
        step = step.__wrapped__
    if getattr(step, "__code__", None) is not _DECORATED:
        return None
    step = step.__wrapped__
    return step if step.__module__.startswith("torch.optim.") else None


def compiled(function: Any, options: dict[str, Any]) -> Any:
    """Compile a copy of `function` into one graph, which runs as a whole or not at all.

    A copy, since torch counts compilations for each code object, up to a limit: those of other optimizers do not count.
    """
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(own, **{"fullgraph": True, **options})


def compiler_errors() -> tuple[type[Exception], ...]:
    """Return what a compiled function raises when it cannot be compiled, or not once more."""
    from torch._dynamo import exc  # takes seconds; whoever compiles has it

    names = ("TorchDynamoException", "FailOnRecompileLimitHit", "RecompileLimitExceeded")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def strided_shard() -> type:
    """Return the kind of placement of a tensor that is sharded twice along one dimension."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard


def is_flattened(p: Tensor) -> bool:
    """Return whether FullyShardedDataParallel (FSDP1) has flattened a parameter."""
    return getattr(p, "_fsdp_flattened", False)


def sparse_values(x: Tensor) -> Tensor:
    """Return the values of a sparse COO tensor, sharing its memory."""
    return x._values()
