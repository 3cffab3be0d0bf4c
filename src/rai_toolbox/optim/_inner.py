"""The inner optimizer: built from what a user gives."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.optim._around import OptimizerAround

OptimParams: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
InnerOptimizer: TypeAlias = Callable[..., Optimizer] | Optimizer


def built(params: OptimParams | None, InnerOpt: InnerOptimizer, kwargs: dict[str, Any]) -> Optimizer:
    """The inner optimizer."""
    if isinstance(InnerOpt, Optimizer):
        if kwargs:
            raise TypeError(f"`InnerOpt` is already an optimizer, so it cannot take the keywords {sorted(kwargs)}")
        params = None if params is None else _as_list(params)
        if params is not None and _ids(params) != _ids(InnerOpt.param_groups):
            raise ValueError(
                "`InnerOpt` is already an optimizer, of other parameters than `params`: let `params` be None"
            )
        mine = set(map(id, InnerOpt.param_groups))
        others = [g for g in params or () if isinstance(g, dict) and id(g) not in mine]
        unused = sorted({key for group in others for key in group} - {"params"})
        if unused:
            raise ValueError(
                f"`InnerOpt` is already an optimizer, whose groups are used: set {unused} in its `param_groups`"
            )
        return InnerOpt
    if not callable(InnerOpt):
        raise TypeError(
            f"`InnerOpt` must be an optimizer class, a partial of one, a callable that returns an optimizer, or an "
            f"optimizer, got {InnerOpt!r}"
        )
    if params is None:
        raise TypeError("`params` may be None only when `InnerOpt` is an optimizer that has parameters already")
    if not isinstance(params, Iterable):
        raise TypeError(
            "`params` must be an iterable of tensors, of named tensors or of groups, as `model.parameters()` is, got "
            f"{type(params).__name__}"
        )
    inner = InnerOpt(params if isinstance(params, Tensor) else copied(params), **kwargs)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`InnerOpt` must return a torch.optim.Optimizer, but {InnerOpt!r} returned {inner!r}")
    return inner


def refuse_unknown(wrapper: str, own: set[str], InnerOpt: InnerOptimizer, given: Iterable[str]) -> None:
    """Raise TypeError for a keyword that is an option neither of the wrapper nor of the inner optimizer."""
    try:
        inners = inspect.signature(cast("Callable[..., Any]", InnerOpt)).parameters
    except (TypeError, ValueError):  # written in C, or already an optimizer
        return
    unknown = sorted(set(given) - set(inners))
    if not unknown or any(one.kind is one.VAR_KEYWORD for one in inners.values()):
        return
    known = (own | set(inners)) - {"self", "args", "kwargs", "inner_opt_kwargs", "params", "InnerOpt"}
    alike = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f"did you mean `{alike[0]}`?" if alike else f"they have {', '.join(sorted(known))}"
    inner = getattr(InnerOpt, "__name__", repr(InnerOpt))
    raise TypeError(f"`{unknown[0]}` is an option neither of {wrapper} nor of its inner optimizer, {inner}; {hint}")


def named_parameters(init: Any) -> set[str]:
    """The names of the parameters of a callable; none where it is written in C."""
    try:
        return set(inspect.signature(init).parameters)
    except ValueError:
        return set()


def keywords_for(InnerOpt: InnerOptimizer) -> set[str]:
    """The keywords that an entry of `defaults` may be meant for."""
    cls, within = InnerOpt, SGD
    while isinstance(cls, functools.partial):
        within = cls.keywords.get("InnerOpt", within)
        cls = cls.func
    if isinstance(cls, type) and issubclass(cls, OptimizerAround):
        return keywords_for(within)
    return named_parameters(cls) if callable(cls) else set()


def copied(params: Iterable[Any]) -> list[Any]:
    """`params` with every group copied, since torch fills in the dict that it is given."""
    copies = []
    for group in params:
        if isinstance(group, dict):
            group = dict(group)
            members = group.get("params")  # without them, torch says so
            if members is not None and not isinstance(members, (Tensor, set)):
                group["params"] = list(members)
        copies.append(group)
    return copies


def _as_list(params: Iterable[Any]) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _ids(params: Iterable[Any]) -> set[int]:
    ids: set[int] = set()
    for p in _as_list(params):
        if isinstance(p, dict):
            ids |= _ids(p["params"])
        else:
            ids.add(id(p[1] if isinstance(p, tuple) else p))
    return ids
