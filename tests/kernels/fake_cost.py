"""What a step asks of a GPU, counted on fake tensors. It wants a CUDA build of torch, and no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Names of operators that give another view of memory, or memory that nobody has written.
_FREE = {
    *("view", "reshape", "as_strided", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "unbind", "t"),
    *("transpose", "permute", "alias", "detach", "flatten", "unflatten", "empty", "empty_like", "new_empty", "device"),
    *("split_with_sizes", "_unsafe_view", "sym_size", "chunk", "diagonal", "set_", "empty_strided", "lift_fresh"),
}


def _nbytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Cost(TorchDispatchMode):
    """Calls that reach the device, the bytes that they read and write, and the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = self.temporary = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        ins, outs = _tensors((args, kwargs)), _tensors(out)
        if name in _FREE or not any(t.device.type == "cuda" for t in ins + outs):
            return out
        written = [
            t
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in _tensors(value)
        ]
        known = set(map(id, ins))
        made = [t for t in outs if id(t) not in known]
        # torch gives about a hundred tensors to a launch
        self.calls += -(-len(_tensors(args[0])) // 100) if name.startswith("_foreach") else 1
        self.bytes += sum(map(_nbytes, ins)) + sum(map(_nbytes, written + made))
        self.temporary = max([self.temporary, *map(_nbytes, made)])
        self.names.append(name)
        return out


@dataclasses.dataclass(frozen=True)
class Step:
    """The second step of an optimizer, in calls, bytes, and units of its largest parameter."""

    calls: int
    bytes: int
    temporary: float
    names: tuple[str, ...]


def step(
    build: Callable[[list[Tensor]], Any], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> Step:
    """Count a step of an optimizer of fake CUDA parameters. A look at a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        for p in params:
            p.grad = torch.empty_like(p)
        optim = build(params)
        optim.step()
        with Cost() as cost:
            optim.step()
    return Step(cost.calls, cost.bytes, cost.temporary / max(map(_nbytes, params)), tuple(cost.names))
