"""The optimizer that wraps an optimizer: options, hooks, and how a step goes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.functional._layout import datum_ndim, write_through
from rai_toolbox.kernels._machine import is_captured, seen
from rai_toolbox.optim._around import keep_options_on_loading
from rai_toolbox.optim._compiled import Compiled
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._group_options import PUT_BY_WRAPPERS, OptimGroup, OptionsInGroups
from rai_toolbox.optim._inner import InnerOptimizer, OptimParams, built, keywords_for, named_parameters, refuse_unknown
from rai_toolbox.optim._one_kernel import OneKernel
from rai_toolbox.optim._one_pass import OnePass
from rai_toolbox.optim._options import check_number, plain, qualified_keys
from rai_toolbox.optim._plans import GroupPlan
from rai_toolbox.optim._remembering import RememberingOptimizer
from rai_toolbox.optim._running import Remembering
from rai_toolbox.optim._separate import SEPARATE, change_sparse_
from rai_toolbox.optim._sharded_gradients import all_zero
from rai_toolbox.optim._tensors import has_nonzero, is_sharded
from rai_toolbox.optim._torch_private import not_traced
from rai_toolbox.optim._transforms import ByNorm, Hook, Stage, Transform

# Who takes a step: the first that accepts it. `compile()` puts another one in front.
_TAKERS = (OneKernel(), OnePass(), SEPARATE)

_PRE, _POST = "_pre_step_transform_", "_post_step_transform_"


def _declared(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook as no more than what `_grad_transform` or `_param_transform` declares: lists may be treated whole."""
    hook._applies_declared_transform = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


@documented
class ParamTransformingOptimizer(RememberingOptimizer, OptionsInGroups):
    """Wrap an optimizer: change each gradient before its step and each parameter after it.

    A step (i) runs the closure, if there is one, (ii) applies `_pre_step_transform_` to every parameter that has a
    gradient, then multiplies the gradient by `grad_scale` and adds `grad_bias`, all in place, (iii) takes a step of
    the inner optimizer, (iv) applies `_post_step_transform_` to every parameter. This class transforms nothing;
    subclasses override one or both of the hooks.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict, optional
        Parameters or parameter groups, as any `torch.optim.Optimizer` takes them. None only with an `InnerOpt`
        instance.
    InnerOpt : type, callable or Optimizer
        What takes the step: an optimizer class, a `functools.partial` of one, any callable that returns an optimizer,
        or an optimizer, whose parameter groups are then used.

    Attributes
    ----------
    inner_opt : Optimizer
        The inner optimizer. `param_groups`, `state` and `defaults` are its own.

    Raises
    ------
    TypeError
        An argument is of the wrong type; `params` is None and `InnerOpt` not an instance; keywords are given for an
        `InnerOpt` that is already built.
    ValueError
        An option lies outside its range, or `param_ndim` does not fit a parameter.

    Notes
    -----
    With LBFGS the transforms run after each evaluation of the closure. Normalised gradients break its curvature
    pairs: give it `line_search_fn="strong_wolfe"`.

    A step whose learning rates and gradients are all zero transforms nothing: that is how
    `torch.distributed.checkpoint` has an optimizer build its state.

    Examples
    --------
    An optimizer that steps along the sign of the gradient, on four entries of largest magnitude per datum:

    >>> import torch
    >>> from rai_toolbox.optim import ParamTransformingOptimizer
    >>> class SignOfTheLargest(ParamTransformingOptimizer):
    ...     def _pre_step_transform_(self, param, optim_group):
    ...         rows = param.grad.flatten(1)  # (N, D): a view
    ...         largest = rows.abs().topk(optim_group["k"]).indices
    ...         rows.copy_(torch.zeros_like(rows).scatter(1, largest, rows.gather(1, largest).sign()))
    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> optim = SignOfTheLargest([x], lr=0.5, defaults={"k": 2})
    >>> (x * torch.tensor([3.0, 1.0, -2.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[-0.5000,  0.0000,  0.5000]], requires_grad=True)
    """

    _not_copied = OptionsInGroups._not_copied | {"_last_plans", "_takers"}
    _links: tuple[ParamTransformingOptimizer, ...] = ()  # of a chain
    _applies_scale = True  # a link of a chain leaves that to the chain, unless it has a scale of its own

    def __init__(
        self,
        params: OptimParams | None = None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        options: dict[str, Any] = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        options |= defaults or {}
        own = set().union(*(named_parameters(cls.__init__) for cls in type(self).__mro__))
        inners = {name: options[name] for name in keywords_for(InnerOpt) & options.keys() - own}
        refuse_unknown(type(self).__name__, own, InnerOpt, inner_opt_kwargs)
        self.inner_opt = built(params, InnerOpt, {**inner_opt_kwargs, **inners})
        self._wrapped_before = frozenset(PUT_BY_WRAPPERS.get(self.inner_opt, ()))
        taken = self.inner_opt._all_option_keys() if isinstance(self.inner_opt, ParamTransformingOptimizer) else set()
        self._refuse_options_of_inner(options.keys() & own - taken)
        if not isinstance(InnerOpt, Optimizer):
            for name in (options.keys() & self.inner_opt.defaults.keys()) - own - taken:
                if name not in inners:
                    raise TypeError(f"`defaults` cannot set {name!r}, which `InnerOpt` sets: give it to {InnerOpt!r}")
                del options[name]
        self._adopt_options(options, qualified_keys(type(self), options, taken))
        self._memory = self._new_memory()
        self._prepare_instance()

    def _prepare_instance(self) -> None:
        super()._prepare_instance()
        self._last_plans: list[GroupPlan] = []
        self._takers: tuple[Any, ...] = _TAKERS
        keep_options_on_loading(self)

    # What a family of optimizers declares.

    def _check_options(self, optim_group: OptimGroup) -> None:
        """Raise unless the options of a group are valid. Extend it for options of your own."""
        for name in ("grad_scale", "grad_bias"):
            check_number(name, optim_group[name])
        for p in optim_group["params"]:
            datum_ndim(p.ndim, optim_group["param_ndim"])

    def _grad_transform(self, optim_group: OptimGroup) -> Transform | None:
        """The change of a gradient before the step, as data. None: no change."""

    def _param_transform(self, optim_group: OptimGroup) -> Transform | None:
        """The change of a parameter after the step, as data. None: no change."""

    # What users override.

    @_declared
    def _pre_step_transform_(self, param: Tensor, optim_group: OptimGroup) -> None:
        """Change `param.grad` in place, before the inner step.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            A view of a parameter that has a gradient; `param_ndim` determines its shape. So is `param.grad`.
        optim_group : mapping
            The parameter group it belongs to.
        """
        transform = self._grad_transform(optim_group)
        if isinstance(transform, Remembering):
            transform = transform.with_memory({n: [self.memory(param, n, f)] for n, f in transform.remembers.items()})
        if transform is not None and param.grad is not None:
            _change_whole_(transform, param.grad)

    @_declared
    def _post_step_transform_(self, param: Tensor, optim_group: OptimGroup) -> None:
        """Change `param` in place, after the inner step; the parameters as for `_pre_step_transform_`."""
        transform = self._param_transform(optim_group)
        if transform is not None:
            _change_whole_(transform, param)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Transform the gradients, step the inner optimizer, transform the parameters.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss. Each time the inner optimizer calls it, the gradients
            are transformed.

        Returns
        -------
        object
            What the closure returned, or None.
        """
        if closure is not None:
            return self._step_with(closure)
        inner = self.inner_opt
        if self._only_initializes_state():
            inner.step()
            self._begin_to_remember(self._plans())
            return None
        plans = self._plans()
        for taker in self._takers:
            if taker.accepts(plans, inner):
                taker.take(plans, inner)
                break
        for plan in plans:
            if plan.remembers:
                self._settle_memory()
                break
        return None

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        only_initializes = False
        evaluations = 0

        def transforming_closure() -> Any:
            nonlocal only_initializes, evaluations
            loss = closure()
            only_initializes = self._only_initializes_state()
            if not only_initializes:
                evaluations += 1
                if evaluations == 2 and any(plan.remembers_of_gradients() for plan in self._plans()):
                    raise RuntimeError(
                        f"{type(self.inner_opt).__name__} evaluated the closure twice in one step, and what "
                        f"{type(self).__name__} remembers would be updated twice: use an inner optimizer that "
                        f"evaluates it once"
                    )
                self._transform_gradients()
            return loss

        loss = self.inner_opt.step(transforming_closure)
        if only_initializes:
            self._begin_to_remember(self._plans())
        else:
            self._transform_parameters()
            self._settle_memory()
        return loss

    def _transform_gradients(self) -> None:
        SEPARATE.change_gradients(self._plans())

    def _transform_parameters(self) -> None:
        SEPARATE.change_parameters(self._plans())

    def compile(self, **options: Any) -> None:
        """Compile the steps to come, as `torch.nn.Module.compile` compiles the calls of a module.

        A step without a closure is then two functions made by `torch.compile`: norms, and all that waits for them, the
        update of the inner optimizer included. The first step is taken as before, the second compiles, which takes
        seconds for one tensor and a minute or more for hundreds. Worth it on a GPU around optimizers other than plain
        SGD, where the ordinary step makes several passes (around plain SGD a Triton kernel joins them), and on
        a CPU for signs and clamps; measure. What cannot be compiled so takes the ordinary step:
        transforms that are neither entrywise nor multiply by a function of a norm, hooks of your own, inner
        optimizers that are not torch's or that somebody hooks or patches, LBFGS, sparse, sharded, float64 or complex
        tensors.

        Parameters
        ----------
        **options
            Keywords of `torch.compile`.

        Notes
        -----
        Schedules of `lr`, `epsilon` and our other numbers compile nothing again. Other shapes, other parameters with
        gradients, and other options of the inner optimizer do: after eight times, or where the compiler fails, a
        RuntimeWarning says so and steps are ordinary ones again.

        A copy, by deepcopy or pickle, is not compiled. On a GPU, where nobody looks at the norms, a datum with an
        infinite entry becomes NaN.

        Examples
        --------
        >>> import torch
        >>> from rai_toolbox.optim import LinfProjectedOptim
        >>> x = torch.zeros(2, 3, requires_grad=True)
        >>> optim = LinfProjectedOptim([x], epsilon=0.1, lr=1.0)
        >>> optim.compile(backend="aot_eager")  # Inductor by default
        """
        self._takers = (Compiled(options, type(self).__name__), *_TAKERS)

    @not_traced
    def _plans(self) -> list[GroupPlan]:
        """Return what is to be done to the tensors of each group: as at the last step, or planned anew."""
        hooks: list[Any] = []
        for optim in (self, *self._links):
            attributes, cls = optim.__dict__, type(optim)
            hooks += attributes.get(_PRE), attributes.get(_POST), cls._pre_step_transform_, cls._post_step_transform_
        last, self._last_plans = self._last_plans, []
        for n, group in enumerate(self.inner_opt.param_groups):
            plan = last[n] if n < len(last) else None
            if plan is None or not plan.holds_for(group, hooks):
                before, after = self._gradient_stages(group), self._parameter_stages(group)
                plan = GroupPlan(group, hooks, before, after, type(self).__name__, plan)
            self._last_plans.append(plan)
        return self._last_plans

    def _gradient_stages(self, group: dict[str, Any]) -> list[Stage]:
        """Return the stages of the gradients of a group."""
        options = self._options(group)
        transform, ndim = self._transform_or_hook(_PRE, self._grad_transform, options), options["param_ndim"]
        memory = weakref.WeakMethod(self._remembered) if isinstance(transform, Remembering) else None
        if not self._applies_scale:
            return [] if transform is None else [Stage(transform, ndim, memory=memory)]
        scale, bias = plain(options["grad_scale"]), plain(options["grad_bias"])
        if isinstance(transform, ByNorm) and scale != 1 and transform.takes(scale):
            transform, scale = transform.scaled(scale), 1.0
        return [] if transform is None and scale == 1 and bias == 0 else [Stage(transform, ndim, scale, bias, memory)]

    def _parameter_stages(self, group: dict[str, Any]) -> list[Stage]:
        """Return the stages of the parameters of a group, after the inner step."""
        options = self._options(group)
        transform = self._transform_or_hook(_POST, self._param_transform, options)
        return [] if transform is None else [Stage(transform, options["param_ndim"])]

    def _transform_or_hook(
        self, name: str, declared: Callable[[OptimGroup], Transform | None], options: OptimGroup
    ) -> Transform | None:
        return declared(options) if self._is_declared(name) else Hook(weakref.ref(self), name, options)

    def _is_declared(self, hook: str) -> bool:
        return hook not in self.__dict__ and getattr(getattr(type(self), hook), "_applies_declared_transform", False)

    def _only_initializes_state(self) -> bool:
        """Return whether every learning rate and every gradient is zero: such a step asks for the state alone."""
        for group in self.inner_opt.param_groups:
            lr = group.get("lr")
            if isinstance(lr, Tensor):
                if not seen(lambda lr=lr: lr.numel() == 1 and lr.item() == 0, lr):
                    return False
            elif lr is None or lr != 0:
                return False
        grads = [p.grad for group in self.inner_opt.param_groups for p in group["params"] if p.grad is not None]
        if not grads or is_captured(grads[0]):
            return False
        if any(map(is_sharded, grads)):
            return all_zero(grads)
        return not any(map(has_nonzero, grads))


def _change_whole_(transform: Transform, x: Tensor) -> None:
    """Change a tensor of shape (N, d0, ...)."""
    if x.layout is torch.strided:
        transform.change_([write_through(x)], [x.ndim - 1])
    else:
        change_sparse_(transform, x, x.ndim - 1)
