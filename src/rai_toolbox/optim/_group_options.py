"""An optimizer around another whose own options live in the parameter groups, beside the inner optimizer's."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.optim._around import OptimizerAround
from rai_toolbox.optim._inner import copied, named_parameters
from rai_toolbox.optim._options import QualifiedOptions, plain

OptimGroup: TypeAlias = Mapping[str, Any]

# The options that wrappers have put into the groups of an inner optimizer.
PUT_BY_WRAPPERS: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()


class OptionsInGroups(OptimizerAround):
    """Options of its own in the groups: checked before they are put there, under names that nobody else has."""

    _qualified: Mapping[str, str]
    _option_keys: tuple[str, ...]
    _wrapped_before: frozenset[str]

    def _check_options(self, optim_group: OptimGroup) -> None:
        """Raise unless the options of a group are valid."""

    def _refuse_options_of_inner(self, names: Set[str]) -> None:
        """Raise if the inner optimizer has an option of the same name: one of the two would silently have its way."""
        inner: Any = self.inner_opt
        while isinstance(inner, OptionsInGroups):
            inner = inner.inner_opt
        shared = names & named_parameters(type(inner).__init__) & inner.defaults.keys()
        if shared:
            name, inners = min(shared), type(inner).__name__
            raise TypeError(
                f"{type(self).__name__} and {inners} both have an option {name!r}: rename that of "
                f"{type(self).__name__}, or hand it on to {inners} as a keyword of `super().__init__`"
            )

    def _adopt_options(self, options: dict[str, Any], keys: dict[str, str]) -> None:
        """Validate `options` for every group, and only then put them into the groups and the defaults."""
        self._qualified = keys
        self._option_keys = tuple(keys.get(name, name) for name in options)
        stored = dict(zip(self._option_keys, map(plain, options.values()), strict=True))
        for group in self.param_groups:
            self._check_group({**stored, **group})
            for key in stored.keys() & self._wrapped_before:
                if group[key] is self.defaults[key] and not _equal(group[key], stored[key]):
                    raise ValueError(
                        f"`InnerOpt` was wrapped before, with {key}={group[key]!r}, which {key}={stored[key]!r} would "
                        f"not change: set it in its `param_groups`, or build another optimizer"
                    )
        self.defaults = {**stored, **self.defaults}
        for group in self.param_groups:
            for key, value in stored.items():
                group[key] = plain(group.get(key, value))
        PUT_BY_WRAPPERS.setdefault(self.inner_opt, set()).update(stored)

    def _all_option_keys(self) -> set[str]:
        keys = set(self._option_keys)
        return keys | self.inner_opt._all_option_keys() if isinstance(self.inner_opt, OptionsInGroups) else keys

    def _options(self, group: dict[str, Any]) -> Any:
        """The group as the transforms see it."""
        for key in self._option_keys:
            if key not in group:  # somebody put a group of their own there
                group[key] = self.defaults[key]
        return self._view(group)

    def _view(self, group: Any) -> Any:
        return QualifiedOptions(group, self._qualified) if self._qualified else group

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_options(self._view(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults for the options that it does not give.

        Parameters
        ----------
        param_group : dict
            `params`, and options of this optimizer or of the inner one. Not changed.

        Raises
        ------
        TypeError, ValueError
            As at construction; the group is then not added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"`param_group` must be a dict, got {param_group!r}")
        group = {key: plain(value) for key, value in copied([param_group])[0].items()}
        params = group["params"]
        tensors = [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]
        if all(isinstance(p, Tensor) for p in tensors):  # else torch says what is wrong
            self._check_group({**self.defaults, **group, "params": tensors})
        self.inner_opt.add_param_group(group)


def _equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)
