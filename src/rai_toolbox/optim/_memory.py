"""What a transform remembers of a parameter from step to step, and where it lies.

Memory lies in the inner optimizer's `state[p]`, under keys such as `AveragedGradientOptim.mean`, so that checkpoints,
copies and shards carry it. Before the inner optimizer's first step it lies aside: torch's optimizers take a state
that is not empty for one that they have initialized.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

First = Callable[[Tensor], Tensor]


def zeros_wide(p: Tensor) -> Tensor:
    """Zeros in the shape of a parameter, in float32 where that is wider than its dtype."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.contiguous_format)


class Memory:
    """The tensors that one optimizer, or one link of a chain, remembers.

    owner: what the keys begin with; no other optimizer around the same inner one may have it.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._aside: dict[Tensor, dict[str, Tensor]] = {}

    def key(self, name: str) -> str:
        """Return the key of a name in `state[p]`."""
        return f"{self.owner}.{name}"

    def get(self, inner: Optimizer, p: Tensor, name: str, first: First) -> Tensor:
        """Return what is remembered of a parameter; at first, `first(p)`."""
        key = self.key(name)
        entry = inner.state.get(p) or {}
        if key in entry:
            return entry[key]
        aside = self._aside.setdefault(p, {})
        if key not in aside:
            with torch.inference_mode(False), torch.no_grad():  # it lasts
                aside[key] = first(p)
        return aside[key]

    def known(self, inner: Optimizer, p: Tensor) -> dict[str, Tensor]:
        """Return all that is remembered of a parameter, by key."""
        entries = {**self._aside.get(p, {}), **(inner.state.get(p) or {})}
        return {key: value for key, value in entries.items() if isinstance(key, str) and key.startswith(self.key(""))}

    def put(self, inner: Optimizer, p: Tensor, key: str, value: Tensor) -> None:
        """Remember a first value of a parameter, if there is none and the key is one of this memory."""
        if key.startswith(self.key("")):
            self.get(inner, p, key[len(self.key("")) :], lambda _: value)

    def settle(self, inner: Optimizer) -> None:
        """Move what lies aside into the inner optimizer's state, which has taken a step."""
        if not self._aside:
            return
        keeps_state = any(inner.state.values())
        for p in list(self._aside):
            if not keeps_state or inner.state.get(p):  # else the inner optimizer has left it out, and has yet to begin
                inner.state[p].update(self._aside.pop(p))

    def forget_what_is_aside(self) -> None:
        """Drop what no step of the inner optimizer has settled."""
        self._aside.clear()


class Noted(dict[str, Tensor]):
    """What a hook remembers of the plain tensor that it is given, by key.

    first: what it asked for and was not there: the values that were made, before the hook changed them.
    """

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        super().__init__(known)
        self.first: dict[str, Tensor] = {}

    def get_or_make(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Return a value, made where there is none."""
        if key not in self:
            self[key] = make()
            self.first[key] = self[key].clone()
        return self[key]


def distinct_owner(name: str, taken: Iterable[str]) -> str:
    """Return `name`, or `name#2` and so on where it is taken."""
    taken = set(taken)
    owner, n = name, 1
    while owner in taken:
        n += 1
        owner = f"{name}#{n}"
    return owner


def keep_memory_on_loading(optim: Any, inner: Optimizer, memories: Callable[[], Any]) -> None:
    """See that loading keeps the dtype of memory, which torch casts to the parameter's, and copies it.

    optim: the hooks go when it goes.
    inner: whose `load_state_dict` is called, by whomever.
    memories: a weak reference to a function that returns what `optim` remembers, a list of `Memory`.
    """
    saved: list[dict[str, Any]] = []

    def keep(_: Any, state_dict: Mapping[str, Any]) -> None:
        saved[:] = []
        some = memories()
        if some is None:
            return
        prefixes = tuple(f"{memory.owner}." for memory in some())
        for group in state_dict["param_groups"]:  # by order: checkpoints name parameters in several ways
            for i in group["params"]:
                entry = state_dict["state"].get(i, {})
                saved.append({k: v for k, v in entry.items() if isinstance(k, str) and k.startswith(prefixes)})

    def put_back(_: Any) -> None:
        some = memories()
        if some is None:
            return
        for memory in some():
            memory.forget_what_is_aside()
        params = [p for group in inner.param_groups for p in group["params"]]
        for p, entry in zip(params, saved, strict=False):
            for key, value in entry.items():
                inner.state[p][key] = value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
        saved[:] = []

    for handle in (inner.register_load_state_dict_pre_hook(keep), inner.register_load_state_dict_post_hook(put_back)):
        weakref.finalize(optim, handle.remove)
