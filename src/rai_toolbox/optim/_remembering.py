"""An optimizer around another that remembers something of its parameters from step to step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rai_toolbox.optim._around import OptimizerAround
from rai_toolbox.optim._memory import First, Memory, Noted, distinct_owner, keep_memory_on_loading, zeros_wide
from rai_toolbox.optim._plans import GroupPlan
from rai_toolbox.optim._separate import rehearse


class RememberingOptimizer(OptimizerAround):
    """What an optimizer and the links of a chain remember, kept through steps, copies and checkpoints.

    A subclass sets `_memory` to what `_new_memory` returns, before it calls `_prepare_instance`.
    """

    _memory: Memory
    _links: tuple[Any, ...] = ()  # of a chain

    def _prepare_instance(self) -> None:
        super()._prepare_instance()
        keep_memory_on_loading(self, self.inner_opt, weakref.WeakMethod(self._memories))

    def _new_memory(self) -> Memory:
        """Return an empty memory, under the name of the class or, where that is taken, with a number after it."""
        return Memory(distinct_owner(type(self).__name__, (m.owner for m in super()._memories())))

    def memory(self, param: Tensor, name: str, first: First = zeros_wide) -> Tensor:
        """Return what this optimizer remembers of a parameter from step to step.

        Parameters
        ----------
        param : Tensor
            A parameter, or what a hook is given for it.
        name : str
            Under which it is remembered: as `state[p]["<class>.<name>"]`, which checkpoints and copies carry.
        first : callable
            `first(p)` makes the tensor when there is none, in the shape of the parameter; by default zeros, in float32
            for halves.

        Returns
        -------
        Tensor
            In the shape of `param`. Change it in place. In a hook that is given a part of a sharded parameter, or its
            data gathered, it is what belongs to these.

        Raises
        ------
        KeyError
            `param` is no parameter of this optimizer.

        Examples
        --------
        >>> import torch
        >>> from rai_toolbox.optim import ParamTransformingOptimizer
        >>> class Momentum(ParamTransformingOptimizer):
        ...     def _pre_step_transform_(self, param, optim_group):
        ...         mean = self.memory(param, "mean")
        ...         param.grad.copy_(mean.mul_(0.5).add_(param.grad))
        >>> x = torch.zeros(1, requires_grad=True)
        >>> optim = Momentum([x], lr=1.0)
        >>> for _ in range(2):
        ...     x.grad = torch.ones(1)
        ...     optim.step()
        >>> x
        tensor([-2.5000], requires_grad=True)
        """
        p = getattr(param, "_viewed_parameter", param)
        noted: Noted | None = getattr(p, "_noted", None)
        if noted is not None:
            return noted.get_or_make(self._memory.key(name), lambda: first(p)).view(param.shape)
        if not any(p is q for group in self.inner_opt.param_groups for q in group["params"]):
            raise KeyError(
                f"{type(self).__name__} has no parameter that is this tensor of shape {tuple(param.shape)}: `memory` "
                f"takes a parameter of its groups, or what a hook is given for one"
            )
        return self._remembered(p, name, first).view(param.shape)

    def _remembered(self, p: Tensor, name: str, first: First) -> Tensor:
        return self._memory.get(self.inner_opt, p, name, first)

    def _known(self, p: Tensor) -> dict[str, Tensor]:
        """All that this optimizer and its links remember of a parameter, by key."""
        known: dict[str, Tensor] = {}
        for memory in (self._memory, *(link._memory for link in self._links)):
            known |= memory.known(self.inner_opt, p)
        return known

    def _put(self, p: Tensor, values: Mapping[str, Tensor]) -> None:
        """Remember first values of a parameter, by key."""
        for memory in (self._memory, *(link._memory for link in self._links)):
            for key, value in values.items():
                memory.put(self.inner_opt, p, key, value)

    def _memories(self) -> list[Memory]:
        return [self._memory, *(link._memory for link in self._links), *super()._memories()]

    def _begin_to_remember(self, plans: Iterable[GroupPlan]) -> None:
        """Make what stages remember, as it is before the first step: a checkpoint is to have a place for it."""
        for plan in plans:
            for stage in plan.before:
                stage.remembered(plan.params)
            for side in (plan.gradients(), plan.parameters()):
                rehearse(side)
        self._settle_memory()

    def _settle_memory(self) -> None:
        for memory in (self._memory, *(link._memory for link in self._links)):
            memory.settle(self.inner_opt)
