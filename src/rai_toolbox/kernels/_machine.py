"""The one place that knows which machine a tensor is on, and so which form of a kernel works on it."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

# Not with a CPU build of torch, Windows, macOS. It is imported when a kernel first runs: that takes a second.
HAS_TRITON = importlib.util.find_spec("triton") is not None
Seen = TypeVar("Seen")

_WITH_TRITON = ("cuda", "xpu")  # a ROCm device is a "cuda" to torch
_NARROW = (torch.float32, torch.float16, torch.bfloat16)

# What tests set: "triton" or "portable", for tensors of a CPU.
_forced: str | None = None
_unusable: set[str] = set()  # devices whose kernels did not compile


def can_branch_on_values(x: Tensor) -> bool:
    """Whether a branch on the values of `x` is free: an ordinary CPU tensor, neither traced nor vmapped."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, Parameter)
        and _forced is None
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    )


def seen(look: Callable[[], Seen], *at: object) -> Seen | None:
    """Return what `look` returns; None, without calling it, where reading values of `at` would wait or be traced."""
    return look() if all(can_branch_on_values(x) for x in at if isinstance(x, Tensor)) else None


def is_on_cpu(*xs: Tensor) -> bool:
    """Whether the form for CPUs works on these tensors."""
    return _forced is None and all(device.type == "cpu" for device in {x.device for x in xs})


def wide_dtype(x: Tensor) -> torch.dtype:
    """The real dtype to compute in: float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def has_values(x: Tensor) -> bool:
    """Whether the tensor holds values: one on a meta device, or a fake one, does not."""
    return x.device.type != "meta" and (type(x) in (Tensor, Parameter) or not _is_plain(x))


def is_captured(x: Tensor) -> bool:
    """Whether what is done to the tensor is recorded in a CUDA graph, not done."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kind_of(device: torch.device) -> str:
    """The type of a device, as torch names it."""
    return device.type


def name_of(device: torch.device) -> str:
    """The name of a CUDA device; of any other, the kind of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def own_generators(device: torch.device) -> list[torch.device]:
    """The device, if it has random numbers of its own: what `torch.random.fork_rng` takes."""
    return [device] if device.type == "cuda" else []


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels work on this tensor: on its device, with its dtype, strided and real, not vmapped."""
    return (
        (x.device.type in _WITH_TRITON or _forced == "triton")
        and x.device.type not in _unusable
        and _forced != "portable"
        and x.dtype in _NARROW
        and x.layout is torch.strided
        and _is_plain(x)
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and _triton_is_there(x.device)
    )


def _triton_is_there(device: torch.device) -> bool:
    if not HAS_TRITON and not torch.compiler.is_compiling():
        give_up(device, ModuleNotFoundError("Triton is not installed"))
    return HAS_TRITON


def all_have_kernels(xs: Sequence[Tensor]) -> bool:
    """Whether Triton's kernels work on all of these together: of one dtype and on one device, each dense as it is."""
    return (
        bool(xs)
        and has_kernels(xs[0])
        and all(
            x.dtype == xs[0].dtype
            and x.device == xs[0].device
            and x.layout is torch.strided
            and _is_plain(x)
            and x.is_contiguous()
            for x in xs
        )
    )


def _is_plain(x: Tensor) -> bool:
    if type(x) in (Tensor, Parameter):
        return True
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and type(x) is fake.FakeTensor


def give_up(device: torch.device, error: Exception) -> None:
    """Use the portable form on such devices from now on, and warn once."""
    if device.type not in _unusable:
        _unusable.add(device.type)
        reason = str(error).strip().split("\n")[0][:300]
        warnings.warn(
            f"rai_toolbox's Triton kernels do not work on this {device.type} device, so that slower operators of torch "
            f"take their place: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def forced(form: str | None) -> Iterator[None]:
    """For tests: use this form, "triton" (in its interpreter) or "portable", also for tensors on a CPU."""
    global _forced
    before, _forced = _forced, form
    try:
        yield
    finally:
        _forced = before
