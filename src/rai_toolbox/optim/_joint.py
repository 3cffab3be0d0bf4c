"""One optimizer out of several: one scheduler, one scaler and one checkpoint for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from rai_toolbox.optim._around import OptimizerAround
from rai_toolbox.optim._wrapper import ParamTransformingOptimizer


class JointOptimizer(OptimizerAround):
    """Step several optimizers as one, each with parameters of its own.

    Schedulers, `torch.amp.GradScaler`, Lightning, accelerate and checkpoints see one optimizer, whose groups are those
    of its members, in their order. Each member steps the parameters that it was built with.

    Parameters
    ----------
    *optimizers : Optimizer
        The members, already built. They stay usable: their groups and their state are shared, not copied.

    Attributes
    ----------
    optimizers : tuple of Optimizer
        The members.
    param_groups : list of dict
        The groups of all members.
    state : mapping
        A view of the members' states, by parameter.
    defaults : dict
        The defaults that all members have.

    Raises
    ------
    TypeError
        There is no member; one is not an optimizer, or is LBFGS, which evaluates the closure itself.
    ValueError
        Two members hold the same parameter.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import JointOptimizer, SignedGradientOptim
    >>> model = torch.nn.Linear(2, 1)
    >>> optim = JointOptimizer(
    ...     SignedGradientOptim([model.weight], lr=0.01), torch.optim.AdamW([model.bias], lr=0.001)
    ... )
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, gamma=0.5)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optim.step()
    >>> scheduler.step()
    >>> [group["lr"] for group in optim.param_groups]
    [0.005, 0.0005]
    """

    inner_opt: Any

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise TypeError("`JointOptimizer` takes one optimizer or more, got none")
        for member in optimizers:
            if not isinstance(member, Optimizer):
                raise TypeError(f"`JointOptimizer` takes optimizers that are built, got {member!r}")
            if isinstance(_innermost(member), LBFGS):
                raise TypeError("LBFGS evaluates the closure several times in a step of its own: it cannot be a member")
        self.inner_opt = _Members(optimizers)
        self.inner_opt.check_disjoint()
        self._prepare_instance()

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The members."""
        return self.inner_opt.optimizers

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every member.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss; called once, before the members step.

        Returns
        -------
        object
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.optimizers:
            member.step()
        return loss

    def compile(self, **options: Any) -> None:
        """Compile the steps to come of every member that has `compile`; torch's own optimizers stay as they are.

        Parameters
        ----------
        **options
            Keywords of `torch.compile`.
        """
        for member in self.optimizers:
            if isinstance(member, JointOptimizer | ParamTransformingOptimizer):
                member.compile(**options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: a group belongs to a member.

        Parameters
        ----------
        param_group : dict
            Not used.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError("add the group to one of the members: `joint.optimizers[0].add_param_group(...)`, say")

    def __repr__(self) -> str:
        members = ",\n".join(map(repr, self.optimizers))
        return f"{type(self).__name__}(\n{members}\n)"


def _innermost(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, OptimizerAround) and isinstance(optimizer.inner_opt, Optimizer):
        optimizer = optimizer.inner_opt
    return optimizer


class _Members:
    """The members, seen as the groups, the state and the checkpoint of one optimizer."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self.optimizers = optimizers

    def check_disjoint(self) -> None:
        seen: dict[Tensor, int] = {}
        for i, member in enumerate(self.optimizers):
            for p in _params(member):
                if seen.setdefault(p, i) != i:
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} belongs to the members {seen[p]} "
                        f"({type(self.optimizers[seen[p]]).__name__}) and {i} ({type(member).__name__}): give it to one"
                    )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.optimizers for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        groups = iter(value)
        for member in self.optimizers:
            member.param_groups = list(itertools.islice(groups, len(member.param_groups)))

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        return _JointState(self.optimizers)

    @state.setter
    def state(self, value: MutableMapping[Tensor, Any]) -> None:
        entries = dict(value)
        for member in self.optimizers:
            member.state.clear()
        self.state.update(entries)

    @property
    def defaults(self) -> dict[str, Any]:
        first, *others = (member.defaults for member in self.optimizers)
        return {key: value for key, value in first.items() if all(key in other for other in others)}

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        raise TypeError("each member has its own `defaults`: set them there")

    def state_dict(self) -> dict[str, Any]:
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for member in self.optimizers:
            saved = member.state_dict()
            for key, entry in saved["state"].items():
                state[key + start if isinstance(key, int) else key] = entry
            groups += [{**group, "params": [i + start for i in group["params"]]} for group in saved["param_groups"]]
            start += sum(len(group["params"]) for group in saved["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        here = [len(group["params"]) for group in self.param_groups]
        saved = [len(group["params"]) for group in groups]
        if here != saved:
            raise ValueError(
                f"the state has groups of {saved} parameters, and the members together have groups of {here}: "
                "build the same members in the same order"
            )
        parts = []
        at = 0
        for member in self.optimizers:
            mine = groups[at : at + len(member.param_groups)]
            at += len(mine)
            ids = [i for group in mine for i in group["params"]]
            own = {i: n for n, i in enumerate(ids)}
            counts = iter(range(len(ids)))
            parts.append(
                {
                    "state": {own[i]: entry for i, entry in state_dict["state"].items() if i in own},
                    "param_groups": [{**group, "params": [next(counts) for _ in group["params"]]} for group in mine],
                }
            )
        for member, part in zip(self.optimizers, parts, strict=True):
            member.load_state_dict(part)


def _params(member: Optimizer) -> Iterator[Tensor]:
    return (p for group in member.param_groups for p in group["params"])


class _JointState(MutableMapping[Tensor, Any]):
    """The states of the members as one mapping; an entry is written to the member that holds its parameter."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self._optimizers = optimizers

    def _state_with(self, p: Any) -> Any:
        for member in self._optimizers:
            if p in member.state or any(p is other for other in _params(member)):
                return member.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        return self._state_with(p)[p]

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._state_with(p)[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._state_with(p)[p]

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(member.state for member in self._optimizers)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))
