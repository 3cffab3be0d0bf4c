"""What a step does to the tensors at hand: one plan for each parameter group, made anew when something changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rai_toolbox.optim._running import Remembering
from rai_toolbox.optim._tensors import refuse_flattened
from rai_toolbox.optim._transforms import Entrywise, Hook, Stage

_grad_of = operator.attrgetter("grad")
_shape_of = operator.attrgetter("shape")
_dtype_of = operator.attrgetter("dtype")
_device_of = operator.attrgetter("device")
_layout_of = operator.attrgetter("layout")
_is = operator.is_


class Side(NamedTuple):
    """Tensors of a group that the same stages change: its gradients, or its parameters."""

    name: str  # under this name takers keep what they lay out for these tensors
    stages: Sequence[Stage]
    tensors: Sequence[Any]
    params: Sequence[Tensor]  # the parameters whose gradients or values the tensors are


class GroupPlan:
    """The stages of a parameter group, and the tensors that they change.

    A plan holds for its group as long as its key does: the group's options (but `lr`, which is the inner optimizer's
    matter) and the hooks, by identity; the parameters; which of them have gradients; and what kinds of tensors they
    are. Takers of a step lay out their work for these tensors in `laid_out`. The plans of groups that are gone are
    dropped at the next step.

    params, grads: the parameters that have a gradient, and these gradients.
    resting: the parameters that have none.
    before, after: what happens to the gradients before the inner step, and to all parameters after it.
    remembers: a stage may remember something of the parameters.
    """

    def __init__(
        self,
        group: dict[str, Any],
        hooks: Sequence[Any],
        before: list[Stage],
        after: list[Stage],
        owner: str,
        previous: GroupPlan | None = None,
    ) -> None:
        self.group = group
        self.before, self.after = before, after
        self._kept_alive = (list(group.values()), list(group["params"]), hooks)  # so that no id is used again
        self._key = self._key_now(group, hooks)
        missing = self._key[1][1]
        self.params = list(itertools.compress(group["params"], map(operator.not_, missing)))
        self.resting = list(itertools.compress(group["params"], missing))
        self.remembers = any(isinstance(s.transform, Remembering | Hook) for s in (*before, *after))
        self.forms = tuple(s.form for s in before), tuple(s.form for s in after)
        self.laid_out: dict[Any, Any] = {}
        if previous is not None and previous.group is group and self._differs_in_numbers_alone(previous):
            self.laid_out = previous.laid_out
        _refuse_unfit(before, self.params, owner)
        _refuse_unfit(after, group["params"], owner)

    def holds_for(self, group: dict[str, Any], hooks: Sequence[Any]) -> bool:
        """Return whether this is still the plan for a group; `grads` are then those of now."""
        return group is self.group and self._key_now(group, hooks) == self._key

    def _key_now(self, group: dict[str, Any], hooks: Sequence[Any]) -> tuple[Any, Any]:
        """Return what was asked for, and the kinds of tensors there are."""
        params = group["params"]
        options = {**group, "lr": None}
        grads = list(map(_grad_of, params))
        missing = list(map(_is, grads, itertools.repeat(None)))
        if True in missing:
            has_grad = list(map(operator.not_, missing))
            grads = list(itertools.compress(grads, has_grad))
            resting = list(map(_shape_of, itertools.compress(params, missing)))
        else:
            resting = None
        self.grads = grads
        return (list(options), list(map(id, options.values())), list(map(id, hooks))), (
            list(map(id, params)),
            missing,
            resting,
            list(map(_dtype_of, params)),
            list(map(type, grads)),
            list(map(_shape_of, grads)),
            list(map(_dtype_of, grads)),
            list(map(_device_of, grads)),
            list(map(_layout_of, grads)),
        )

    def _differs_in_numbers_alone(self, other: GroupPlan) -> bool:
        return self._key[1] == other._key[1] and self.forms == other.forms

    def remembers_of_gradients(self) -> bool:
        """Return whether a change of the gradients remembers something, so that it must be made once a step."""
        return any(
            stage.memory is not None
            or (isinstance(stage.transform, Hook) and any(map(stage.transform.known, self.params)))
            for stage in self.before
        )

    def gradients(self) -> Side:
        """Return the gradients, which the inner step is to find changed."""
        return Side("gradients", self.before, self.grads, self.params)

    def parameters(self) -> Side:
        """Return all parameters, which are changed after the inner step."""
        params = self.group["params"]
        return Side("parameters", self.after, params, params)

    def parameters_at_rest(self) -> Side:
        """Return the parameters without a gradient: a step that is taken as one leaves them to others."""
        return Side("parameters at rest", self.after, self.resting, self.resting)


def _refuse_unfit(stages: Sequence[Stage], params: Sequence[Tensor], owner: str) -> None:
    """Raise if stages cannot change parameters, or their gradients."""
    transforms = [s.transform for s in stages if s.transform is not None]
    if not all(isinstance(t, Entrywise) for t in transforms):
        refuse_flattened(params, owner)
    if any(not isinstance(t, Hook) for t in transforms):
        for p in params:
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(
                    f"{owner} transforms floating-point parameters, but one of shape {tuple(p.shape)} has the dtype "
                    f"{p.dtype}: leave it out of the parameter groups"
                )
