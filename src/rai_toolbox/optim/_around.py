"""An optimizer around another: whose groups, state and defaults are the inner one's, and all that torch expects of one.

Nothing is copied, so nothing is ever out of step, whichever of the two was loaded, assigned to, copied or pickled.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer

from rai_toolbox.optim._memory import Memory
from rai_toolbox.optim._torch_private import HOOK_TABLES, SCHEDULERS_MARK, prepare_optimizer


class OptimizerAround(Optimizer):
    """An optimizer around `inner_opt`. Subclasses implement `step`.

    A subclass sets `inner_opt` and then calls `_prepare_instance`, never `Optimizer.__init__`, which would make groups
    and a state of its own.
    """

    inner_opt: Optimizer
    _not_copied: frozenset[str] = frozenset({SCHEDULERS_MARK})  # attributes that a copy makes anew

    def _prepare_instance(self) -> None:
        """Set what neither copies nor pickles carry. Extend it for attributes of your own."""
        prepare_optimizer(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore
        self.inner_opt.param_groups = value

    @property
    def state(self) -> Any:  # pyright: ignore
        return self.inner_opt.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore
        self.inner_opt.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner_opt.defaults = value

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless the options of a group are valid."""

    def _memories(self) -> list[Memory]:
        """Return what this optimizer, and others between it and the innermost one, remember of parameters."""
        return self.inner_opt._memories() if isinstance(self.inner_opt, OptimizerAround) else []

    def _all_option_keys(self) -> set[str]:
        """The keys of the groups that are not the inner optimizer's."""
        return set()

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, as the inner optimizer does; see `torch.optim.Optimizer.state_dict`."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.inner_opt.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, from this optimizer or from a bare inner one.

        Parameters
        ----------
        state_dict : dict
            Options that it does not hold keep their values. Not changed.

        Raises
        ------
        TypeError, ValueError
            It holds an option that is not valid, or was made for other groups; nothing is then loaded.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        # torch says if there are not as many
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            self._check_group({**group, **saved, "params": group["params"]})
        self.inner_opt.load_state_dict(state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Others put patched methods (a scheduler's or accelerate's `step`) and hooks, which cannot be pickled, in here.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in HOOK_TABLES
            and name not in self._not_copied
            and not callable(getattr(type(self), name, None))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner_opt" in state:
            self.__dict__.update(state)
            self._prepare_instance()
        else:  # `Optimizer.load_state_dict` was called on us: new groups and state
            self.inner_opt.__setstate__(state)

    def __repr__(self) -> str:
        groups = super().__repr__()
        return f"{self._repr_name()} [{type(self.inner_opt).__name__}]({groups.partition('(')[2]}"

    def _repr_name(self) -> str:
        return type(self).__name__


def keep_options_on_loading(optim: OptimizerAround) -> None:
    """See that options which a checkpoint does not hold, a bare inner one say, survive it, whoever loads it."""
    ref = weakref.ref(optim)
    kept: list[dict[str, Any]] = []

    def keep(*_: Any) -> None:
        optim = ref()
        if optim is not None:
            keys = optim._all_option_keys()
            kept[:] = [{key: group[key] for key in keys if key in group} for group in optim.param_groups]

    def put_back(_: Any) -> None:
        optim = ref()
        if optim is not None:
            for group, options in zip(optim.param_groups, kept, strict=True):
                group.update({key: value for key, value in options.items() if key not in group})

    for handle in (
        optim.inner_opt.register_load_state_dict_pre_hook(keep),
        optim.inner_opt.register_load_state_dict_post_hook(put_back),
    ):
        weakref.finalize(optim, handle.remove)
