"""The options of an optimizer, as they live in its parameter groups."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ParamSpec

import torch
from torch import Tensor

from rai_toolbox.functional._layout import datum_ndim, is_number
from rai_toolbox.kernels._machine import has_values

P = ParamSpec("P")


class QualifiedOptions(MutableMapping[str, Any]):
    """A parameter group seen by one of several wrappers that share it: its own options under their plain names.

    Two clamps in one chain both call their bound `clamp_min`; the group holds the second one's as
    `ClampedParameterOptimizer.clamp_min`. Everything else is the group's.
    """

    def __init__(self, group: dict[str, Any], keys: Mapping[str, str]) -> None:
        self._group = group
        self._keys = keys

    def __getitem__(self, name: str) -> Any:
        return self._group[self._keys.get(name, name)]

    def __setitem__(self, name: str, value: Any) -> None:
        self._group[self._keys.get(name, name)] = value

    def __delitem__(self, name: str) -> None:
        del self._group[self._keys.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._group

    def __len__(self) -> int:
        return len(self._group)

    def __repr__(self) -> str:
        return repr(dict(self))


def qualified_keys(owner: type, names: Mapping[str, Any], taken: set[str]) -> dict[str, str]:
    """The keys of those options of `owner` whose plain name is taken: `Owner.name`, or `Owner#2.name`."""
    keys: dict[str, str] = {}
    for name in names:
        if name in taken:
            key, n = f"{owner.__name__}.{name}", 1
            while key in taken:
                n += 1
                key = f"{owner.__name__}#{n}.{name}"
            keys[name] = key
    return keys


def required(*names: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Let an `__init__` whose keyword-only `names` have no default be called without them.

    They arrive as None, so that a parameter group or `defaults` may give them; `check_*` below refuse None. The
    published signature is the one that is written: without a default.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        missing = set(names) - inspect.signature(init).parameters.keys()
        if missing:
            raise TypeError(f"{init.__qualname__} has no parameters {sorted(missing)}")

        @functools.wraps(init)
        def __init__(*args: P.args, **kwargs: P.kwargs) -> None:
            for name in names:
                kwargs.setdefault(name, None)
            init(*args, **kwargs)

        return __init__

    return decorate


def plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, which checkpoints can hold, and anything else as it is."""
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise unless `value` is a real number in [low, high]."""
    _check_type(name, value, "a number")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a number {_range_text(low, high)}, got {value!r}")


def check_radius(name: str, optim_group: Mapping[str, Any]) -> None:
    """Raise unless an option is a number ≥ 0, or a tensor of them with one entry per datum of every parameter."""
    value = optim_group[name]
    if isinstance(value, Tensor):
        is_right = value.is_floating_point() and not value.requires_grad
        if not is_right or (has_values(value) and not bool((value >= 0).all())):
            raise ValueError(
                f"`{name}` must have entries ≥ 0 of a floating dtype and not require a gradient, got {value!r}"
            )
        for p in optim_group["params"]:
            _check_fits(name, value, p, datum_ndim(p.ndim, optim_group["param_ndim"]))
        return
    _check_type(name, value, "a number or a tensor with one entry per datum")
    if not value >= 0:
        raise ValueError(f"`{name}` must be ≥ 0, got {value!r}")


def _check_type(name: str, value: object, what: str) -> None:
    if value is None:
        raise TypeError(
            f"`{name}` is required: give it as a keyword, in every parameter group, or in `defaults`; it must be {what}"
        )
    if not is_number(value):
        raise TypeError(f"`{name}` must be {what}, got {value!r}")


def _range_text(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "other than NaN"
    if math.isinf(high):
        return f"≥ {low:g}"
    return f"in [{low:g}, {high:g}]"


def _check_fits(name: str, value: Tensor, p: Tensor, k: int) -> None:
    """Raise unless `value` has one entry for each datum (last k dimensions) of `p`."""
    if value.numel() == 1:
        return
    batch = p.shape[: p.ndim - k]
    try:
        fits = torch.broadcast_shapes(value.shape, batch) == batch or value.shape == (batch.numel(),)
    except RuntimeError:
        fits = value.shape == (batch.numel(),)
    if not fits:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}, but a parameter of shape {tuple(p.shape)} has data of shape "
            f"{tuple(p.shape[p.ndim - k :])} in a batch of shape {tuple(batch)}: give a number, or one entry per datum"
        )
