"""Several transforming optimizers as one, on one inner optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._memory import distinct_owner
from rai_toolbox.optim._options import qualified_keys
from rai_toolbox.optim._tensors import scale_and_shift_
from rai_toolbox.optim._torch_private import has_step_hooks
from rai_toolbox.optim._transforms import Stage
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer, _declared

_UNSCALED = {"grad_scale": 1.0, "grad_bias": 0.0}
_SHARED = {"param_ndim", *_UNSCALED}


@documented
class ChainedParamTransformingOptimizer(ParamTransformingOptimizer):
    """Apply the transforms of several optimizers, left to right, around one step of one inner optimizer.

    Links `Opt1, Opt2, Opt3` change a gradient g to f3(f2(f1(g))) before the step, and a parameter likewise after it.

    Parameters
    ----------
    *transforming_optimizers : type or functools.partial
        Subclasses of `ParamTransformingOptimizer`, or partials of them that give their options.
    params : iterable of Tensor, of (str, Tensor), or of dict, optional
        As for `ParamTransformingOptimizer`.

    Raises
    ------
    TypeError
        A link is neither a class nor a partial of one; or as `ParamTransformingOptimizer`.
    ValueError
        As the links.

    Notes
    -----
    A link takes no step of its own: one that overrides `step` or registers hooks of it is refused.

    The options of all links live in the groups. Where two links share the name of an option, the second one's key
    carries its class: `ClampedParameterOptimizer.clamp_min`. A link has the chain's `param_ndim` unless its partial
    gives another; `grad_scale` and `grad_bias` of a partial apply right after that link, those of the chain at the end.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from rai_toolbox.optim import (
    ...     ChainedParamTransformingOptimizer, ClampedParameterOptimizer, SignedGradientOptim, TopQGradientOptimizer,
    ... )
    >>> x = torch.ones(1, 4, requires_grad=True)
    >>> optim = ChainedParamTransformingOptimizer(
    ...     partial(TopQGradientOptimizer, q=0.5),
    ...     SignedGradientOptim,
    ...     partial(ClampedParameterOptimizer, clamp_min=0.0, clamp_max=1.0),
    ...     params=[x],
    ...     lr=0.75,
    ... )
    >>> (x * torch.tensor([1.0, -3.0, 2.0, 0.5])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[1.0000, 1.0000, 0.2500, 1.0000]], requires_grad=True)
    """

    def __init__(
        self,
        *transforming_optimizers: Any,
        params: OptimParams | None = None,
        InnerOpt: InnerOptimizer = SGD,
        param_ndim: int | None = -1,
        grad_scale: float = 1,
        grad_bias: float = 0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        links = _flattened(transforming_optimizers)
        self._links: tuple[ParamTransformingOptimizer, ...] = ()
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults=defaults,
            **inner_opt_kwargs,
        )
        from_user = set(self.defaults).intersection(*(group.keys() for group in self.param_groups)) | set(
            set(self.param_groups[0]).intersection(*(group.keys() for group in self.param_groups))
        )
        for link in links:
            self._links = (*self._links, self._built_link(link, from_user))

    def _built_link(self, link: Any, from_user: set[str]) -> ParamTransformingOptimizer:
        """Let a link check its options beside those that came from the user, then put them into the chain's groups.

        An option has its plain name, unless an earlier link has an option of that name already; one that the user gave
        in the groups or in `defaults` holds for every link that does not say otherwise.
        """
        earlier = {key for other in self._links for key in other._option_keys} - from_user
        hidden = {*earlier, *_SHARED, "params"}
        groups = [{"params": [], **{k: v for k, v in g.items() if k not in hidden}} for g in self.param_groups]
        built: ParamTransformingOptimizer = link(
            params=None, InnerOpt=_Platform(groups, {k: v for k, v in self.defaults.items() if k not in hidden})
        )
        _refuse_own_step(built)
        given = dict(link.keywords) if isinstance(link, functools.partial) else {}
        given |= given.get("defaults") or {}
        given |= _fixed_by_class(built)
        scales = not given.keys().isdisjoint(_UNSCALED)
        own = {}
        for name in built._option_keys:
            if name not in _SHARED or name in given:
                own[name] = given.get(name, built.defaults[name])
            elif name in _UNSCALED and scales:
                own[name] = _UNSCALED[name]
        taken = {
            *_SHARED,
            *earlier,
            *(name for name in given if any(name in o._option_keys for o in self._links)),
        }
        built.inner_opt = self.inner_opt
        built._applies_scale = scales
        built._wrapped_before = self._wrapped_before
        built._memory.owner = distinct_owner(type(built).__name__, (m.owner for m in self._memories()))
        taken |= self._all_option_keys() - from_user
        built._refuse_options_of_inner(own.keys() - taken)
        built._adopt_options(own, qualified_keys(type(built), own, taken))
        return built

    def _all_option_keys(self) -> set[str]:
        return super()._all_option_keys().union(*(link._option_keys for link in self._links))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for link in self._links:
            link._check_group(group)

    @_declared
    def _pre_step_transform_(self, param: Tensor, optim_group: OptimGroup) -> None:
        for link in self._links:
            options = link._view(optim_group)
            link._pre_step_transform_(param=param, optim_group=options)
            if link._applies_scale and param.grad is not None:
                scale_and_shift_([param.grad], options["grad_scale"], options["grad_bias"])

    @_declared
    def _post_step_transform_(self, param: Tensor, optim_group: OptimGroup) -> None:
        for link in self._links:
            link._post_step_transform_(param=param, optim_group=link._view(optim_group))

    def _gradient_stages(self, group: dict[str, Any]) -> list[Stage]:
        own = super()._gradient_stages(group)
        links = self._links if self._is_declared("_pre_step_transform_") else ()
        return [*(stage for link in links for stage in link._gradient_stages(group)), *own]

    def _parameter_stages(self, group: dict[str, Any]) -> list[Stage]:
        own = super()._parameter_stages(group)
        links = self._links if self._is_declared("_post_step_transform_") else ()
        return [*(stage for link in links for stage in link._parameter_stages(group)), *own]

    def _repr_name(self) -> str:
        return " ○ ".join(link._repr_name() for link in reversed(self._links)) or super()._repr_name()


def _fixed_by_class(built: ParamTransformingOptimizer) -> dict[str, Any]:
    """Return the shared options that the `__init__` of a link's class sets itself, whatever the chain says."""
    fixed = {}
    for name in _SHARED:
        signatures = (inspect.signature(cls.__init__).parameters for cls in type(built).__mro__)
        default = next(parameters[name].default for parameters in signatures if name in parameters)
        if built.defaults[name] != default:
            fixed[name] = built.defaults[name]
    return fixed


def _refuse_own_step(built: ParamTransformingOptimizer) -> None:
    """Raise if a link expects steps of its own: in a chain, only the chain takes steps."""
    if has_step_hooks(built) or inspect.unwrap(type(built).step) is not inspect.unwrap(ParamTransformingOptimizer.step):
        raise TypeError(
            f"{type(built).__name__} cannot be a link of a chain: it overrides `step` or registers hooks of its steps, "
            f"which a link does not take; register hooks on the chain"
        )


class _Platform(Optimizer):
    """Groups for a link to be built on, so that it does not write into the chain's."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    def step(self, closure: Any = None) -> Any:  # never called
        raise NotImplementedError


def _flattened(links: Iterable[Any]) -> list[Any]:
    """The links, where a chain among them is replaced by its own links."""
    flat: list[Any] = []
    for link in links:
        cls, args, options = (
            (link.func, link.args, link.keywords) if isinstance(link, functools.partial) else (link, (), {})
        )
        if not (isinstance(cls, type) and issubclass(cls, ParamTransformingOptimizer)):
            raise TypeError(
                f"a link of a chain must be a subclass of ParamTransformingOptimizer, or a functools.partial of one, "
                f"got {link!r}"
            )
        known = {name for base in cls.__mro__ for name in inspect.signature(base.__init__).parameters}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no option {unknown[0]!r}: a link of a chain takes its own options, those of the "
                f"inner optimizer are given to the chain"
            )
        if not issubclass(cls, ChainedParamTransformingOptimizer):
            _refuse_own_inner(cls)
            flat.append(link)
            continue
        if cls is not ChainedParamTransformingOptimizer or options.keys() - _SHARED:
            raise TypeError(
                f"a chain that is a link of a chain must be ChainedParamTransformingOptimizer itself, and may have "
                f"of its options {sorted(_SHARED)}, got {link!r}"
            )
        shape = {"param_ndim": options["param_ndim"]} if "param_ndim" in options else {}
        flat += [
            functools.partial(one, **{**shape, **getattr(one, "keywords", {})}) if shape else one
            for one in _flattened(args)
        ]
        scales = {name: options[name] for name in _UNSCALED if name in options}
        if scales:
            flat.append(functools.partial(ParamTransformingOptimizer, **scales))
    return flat


def _refuse_own_inner(cls: type) -> None:
    parameters = inspect.signature(cls.__init__).parameters  # pyright: ignore[reportAttributeAccessIssue]
    if "InnerOpt" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{cls.__name__} cannot be a link of a chain: it takes no `InnerOpt`, since it brings an inner optimizer "
            f"of its own; give the chain that one, and a link that has the transform alone"
        )
