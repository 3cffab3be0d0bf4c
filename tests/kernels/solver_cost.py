"""What a solver asks of a device for each question to the model, counted on a CPU.

The solver runs as it would on a device with kernels: no look is free there, and each kernel is one call. What a kernel
does is done by operators of torch, which are not counted. So the numbers are real ones, and every branch on a value
that the solver takes is the one that it would take.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.kernels.fake_cost import _FREE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rai_toolbox.kernels import _machine, _operators

# Operators that wait for what they return; an index by a mask is another.
_LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}


@contextlib.contextmanager
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No look is free, and there are kernels."""
    with monkeypatch.context() as patch, _machine.forced("triton"):
        patch.setattr(_machine, "HAS_TRITON", True)
        patch.setattr(_machine, "_unusable", set())
        patch.setattr(_operators, "_kernel", None)  # what a kernel does, operators of torch do
        patch.setattr(_machine, "give_up", lambda *args: None)
        yield


class Counter(TorchDispatchMode):
    """Calls, looks, and where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.looks: collections.Counter[str] = collections.Counter()
        self.where: collections.Counter[str] = collections.Counter()
        self.traced = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put")) and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])
        )
        if name in _LOOKS or by_mask:
            self.looks[name] += 1
            self.note("look ")
        if name not in _FREE and name != "_local_scalar_dense":
            self.calls[name] += 1
            self.note("call ")
        return out

    def note(self, kind: str) -> None:
        if self.traced:
            frames = [f for f in traceback.extract_stack() if "rai_toolbox/" in f.filename]
            if frames:
                frame = frames[-1]
                self.where[f"{kind}{frame.filename.split('rai_toolbox/')[-1]}:{frame.lineno} {frame.name}"] += 1


class Asked(nn.Module):
    """A small classifier that counts the questions it is asked, one for each forward pass."""

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8), classes: int = 10) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = torch.Size(shape).numel()
        self.first, self.last = nn.Linear(size, 16), nn.Linear(16, classes)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        self.questions = 0

    def forward(self, x: Tensor) -> Tensor:
        self.questions += 1
        return self.last(self.first(x.flatten(1)).tanh())


@dataclasses.dataclass(frozen=True)
class PerQuestion:
    """Calls beside the model's own, and looks, for each question."""

    calls: float
    looks: float
    counter: Counter
    questions: int


def per_question(
    solve: Callable[[nn.Module, Tensor, Tensor], Any], patch: pytest.MonkeyPatch, traced: bool = False
) -> PerQuestion:
    """Count a whole solve, whatever comes before the first question and after the last included."""
    model = Asked()
    data = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    target = model(data).argmax(1)
    with Counter() as own:  # one forward and one backward pass
        leaf = data.clone().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf)
    model.questions = 0
    with as_on_a_device(patch), Counter() as counter:
        counter.traced = traced
        solve(model, data, target)
    calls = counter.calls.total() / model.questions - own.calls.total()
    return PerQuestion(calls, counter.looks.total() / model.questions, counter, model.questions)
