"""The optimizer that wraps an optimizer: options, hooks, and how a step goes."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.optim import _engine
from rai_toolbox.optim._around import OptimizerAround, keep_options_on_loading
from rai_toolbox.optim._compiled import CompiledStep, Group
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._hooks import refuse_flattened, run_hook
from rai_toolbox.optim._inner import InnerOptimizer, OptimParams, built, copied, keywords_for, named_parameters
from rai_toolbox.optim._one_pass import OnePass, Stage, is_plain_sgd
from rai_toolbox.optim._options import QualifiedOptions, check_number, qualified_keys
from rai_toolbox.optim._transforms import ByNorm, Transform

OptimGroup: TypeAlias = Mapping[str, Any]

# The options that wrappers have put into the groups of an inner optimizer.
_PUT_BY_WRAPPERS: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()

# How often the compiled step of an optimizer is made anew before it is given up.
_COMPILATIONS = 8

# Under torch.compile a step breaks the graph anyway, as those of torch's optimizers do; the transforms plan, draw and
# look at values, so they run as they are.
# torch.compiler.disable would import the compiler when we are imported.
_not_traced: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]


def _declared(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook as no more than what `_grad_transform` or `_param_transform` declares: lists may be treated whole."""
    hook._applies_declared_transform = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


@documented
class ParamTransformingOptimizer(OptimizerAround):
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
    {options}

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

    _not_copied = OptimizerAround._not_copied | {
        "_memos",
        "_passes",
        "_known_stages",
        "_compile_options",
        "_compiled",
        "_compilations",
    }
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
        self.inner_opt = built(params, InnerOpt, {**inner_opt_kwargs, **inners})
        self._wrapped_before = frozenset(_PUT_BY_WRAPPERS.get(self.inner_opt, ()))
        taken = self.inner_opt._all_option_keys() if isinstance(self.inner_opt, ParamTransformingOptimizer) else set()
        if not isinstance(InnerOpt, Optimizer):
            for name in (options.keys() & self.inner_opt.defaults.keys()) - own - taken:
                if name not in inners:
                    raise TypeError(f"`defaults` cannot set {name!r}, which `InnerOpt` sets: give it to {InnerOpt!r}")
                del options[name]
        self._adopt_options(options, qualified_keys(type(self), options, taken))
        self._prepare_instance()

    def _adopt_options(self, options: dict[str, Any], keys: dict[str, str]) -> None:
        """Validate `options` for every group, and only then put them into the groups and the defaults."""
        self._qualified = keys
        self._option_keys = tuple(keys.get(name, name) for name in options)
        stored = dict(zip(self._option_keys, options.values(), strict=True))
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
                group.setdefault(key, value)
        _PUT_BY_WRAPPERS.setdefault(self.inner_opt, set()).update(stored)

    def _prepare_instance(self) -> None:
        super()._prepare_instance()
        self._memos: dict[int, dict[Any, _engine.Memo]] = {}
        self._passes: dict[int, OnePass] = {}
        self._known_stages: dict[int, Any] = {}
        self._compile_options: dict[str, Any] | None = None
        self._compiled: CompiledStep | None = None
        self._compilations = 0
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
        if transform is not None and param.grad is not None:
            _engine.apply_(transform, [param.grad], -1)

    @_declared
    def _post_step_transform_(self, param: Tensor, optim_group: OptimGroup) -> None:
        """Change `param` in place, after the inner step; the parameters as for `_pre_step_transform_`."""
        transform = self._param_transform(optim_group)
        if transform is not None:
            _engine.apply_(transform, [param], -1)

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
        probe = False

        def transforming_closure() -> Any:
            nonlocal probe
            loss = closure()  # pyright: ignore[reportOptionalCall]
            probe = self._is_probe()
            if not probe:
                self._transform_gradients()
            return loss

        if closure is None:
            probe = self._is_probe()
            if not probe and (
                (self._compile_options is not None and self._step_compiled()) or self._step_in_one_pass()
            ):
                return None
            if not probe:
                self._transform_gradients()
            self.inner_opt.step()
            loss = None
        else:
            loss = self.inner_opt.step(transforming_closure)
        if not probe:
            self._transform_parameters()
        return loss

    def compile(self, **options: Any) -> None:
        """Compile the steps to come, as `torch.nn.Module.compile` compiles the calls of a module.

        A step without a closure is then two functions made by `torch.compile`: norms, and all that waits for them, the
        update of the inner optimizer included. The first step is taken as before, the second compiles, which takes
        seconds for one tensor and a minute or more for hundreds. Worth it on a GPU, where the ordinary step makes
        several passes, and on a CPU for signs and clamps; measure. What cannot be compiled so takes the ordinary step:
        transforms that are neither entrywise nor multiply by a function of a norm, hooks of your own, inner
        optimizers that are not torch's or that somebody hooks or patches, LBFGS, sparse, sharded, float64 or complex
        tensors.

        Parameters
        ----------
        **options
            Keywords of `torch.compile`.

        Notes
        -----
        An option that changes is compiled anew, a float `lr` too: with a scheduler, let `lr` be a tensor. After eight
        such changes, or where the compiler fails, a RuntimeWarning says so and steps are ordinary ones again.

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
        self._compile_options = options
        self._compiled = None
        self._compilations = 0

    @torch.no_grad()
    def _step_compiled(self) -> bool:
        """Take the whole step by compiled functions, if that was asked for and can be."""
        options = self._compile_options
        if options is None or torch.compiler.is_compiling():
            return False
        groups = []
        for group in self.param_groups:
            before, after = self._stages(group)
            if before is None or after is None:
                return False
            groups.append(Group([p for p in group["params"] if p.grad is not None and p.numel()], before, after))
        if self._compiled is None:  # this step makes the state that the compiled ones find
            self._compiled = CompiledStep(self.inner_opt, groups, options)
            return False
        if not self._compiled.holds_for(self.inner_opt, groups):
            self._compilations += 1
            if self._compilations > _COMPILATIONS:
                self._compile_options = self._compiled = None
                warnings.warn(
                    f"the options of {type(self).__name__}, or which parameters have a gradient, changed "
                    f"{_COMPILATIONS} times since `compile()`: from now on it takes ordinary steps",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return False
            self._compiled = CompiledStep(self.inner_opt, groups, options)
        if not self._compiled.take():
            return False
        for group in self.param_groups:
            resting = [p for p in group["params"] if p.grad is None]
            if resting:
                self._transform_parameters_of(group, resting)
        return True

    @_not_traced
    @torch.no_grad()
    def _step_in_one_pass(self) -> bool:
        """Take the whole step block by block, if that cannot be told from taking it in three parts."""
        if not is_plain_sgd(self.inner_opt):
            return False
        work = []
        for group in self.param_groups:
            before, after = self._stages(group)
            if before is None or after is None:
                return False
            params = [p for p in group["params"] if p.grad is not None]
            passes = self._passes.get(id(group))
            if passes is None or not passes.holds_for(params, [*before, *after]):
                passes = self._kept(self._passes)[id(group)] = OnePass(params, [*before, *after])
            grads: list[Any] = [p.grad for p in params]
            if not passes.fits(grads):
                return False
            work.append((group, passes, grads, before, after))
        for group, passes, grads, before, after in work:
            passes.step(grads, group["lr"], before, after)
            if len(grads) < len(group["params"]):
                self._transform_parameters_of(group, [p for p in group["params"] if p.grad is None])
        return True

    @_not_traced
    @torch.no_grad()
    def _transform_gradients(self) -> None:
        _engine.settle_gradients([p for group in self.param_groups for p in group["params"]])
        with self._drawing_alike(), _engine.together():
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._transform_gradients_of(group, params)

    @_not_traced
    @torch.no_grad()
    def _transform_parameters(self) -> None:
        with _engine.together():
            for group in self.param_groups:
                if group["params"]:
                    self._transform_parameters_of(group, group["params"])

    def _drawing_alike(self) -> AbstractContextManager[None]:
        """The context in which what a step leaves to chance is drawn: there, all ranks draw the same."""
        return nullcontext()

    def _gradient_stages(self, group: dict[str, Any]) -> list[Stage] | None:
        """What becomes of the gradients of a group, or None where a user's hook has a hand in it."""
        if not self._is_declared("_pre_step_transform_"):
            return None
        options = self._options(group)
        scale, bias = (options["grad_scale"], options["grad_bias"]) if self._applies_scale else (1.0, 0.0)
        transform = self._grad_transform(options)
        if isinstance(transform, ByNorm) and scale != 1 and transform.takes(scale):
            transform, scale = transform.scaled(scale), 1.0
        return [Stage(transform, options["param_ndim"], scale, bias)]

    def _parameter_stages(self, group: dict[str, Any]) -> list[Stage] | None:
        """What becomes of the parameters of a group after the step, or None where a user's hook has a hand in it."""
        if not self._is_declared("_post_step_transform_"):
            return None
        options = self._options(group)
        return [Stage(self._param_transform(options), options["param_ndim"])]

    def _stages(self, group: dict[str, Any]) -> tuple[list[Stage] | None, list[Stage] | None]:
        """The stages before and after the inner step, built anew only when an option or a hook is another object."""
        hooks = ("_pre_step_transform_", "_post_step_transform_")
        # whatever lr is, the inner optimizer deals with it
        options = [value for key, value in group.items() if key != "lr"]
        values = [*options, *(self.__dict__.get(h) for h in hooks), *(getattr(type(self), h) for h in hooks)]
        known = self._known_stages.get(id(group))
        if known is None or len(known[0]) != len(values) or not all(map(operator.is_, known[0], values)):
            known = self._kept(self._known_stages)[id(group)] = (
                values,
                (self._gradient_stages(group), self._parameter_stages(group)),
            )
        return known[1]

    def _transform_gradients_of(self, group: dict[str, Any], params: list[Tensor]) -> None:
        stages, _ = self._stages(group)
        if stages is None:
            options = self._options(group)
            refuse_flattened(params, None, self)
            for p in params:
                run_hook(self, self._pre_step_transform_, p, options)
            if self._applies_scale:
                grads = [p.grad for p in params if p.grad is not None]
                _engine.scale_and_shift_(grads, options["grad_scale"], options["grad_bias"])
        else:
            self._run_stages(stages, [p.grad for p in params], params, group, "gradients")

    def _transform_parameters_of(self, group: dict[str, Any], params: list[Tensor]) -> None:
        _, stages = self._stages(group)
        if stages is None:
            refuse_flattened(params, None, self)
            for p in params:
                run_hook(self, self._post_step_transform_, p, self._options(group))
        else:
            self._run_stages(stages, params, params, group, "parameters")

    def _run_stages(
        self, stages: list[Stage], tensors: list[Any], params: list[Tensor], group: dict[str, Any], which: str
    ) -> None:
        memos = self._memos.get(id(group))
        if memos is None:
            memos = self._kept(self._memos)[id(group)] = {}
        for n, stage in enumerate(stages):
            if stage.transform is not None:
                refuse_flattened(params, stage.transform, self)
                memo = memos.get((which, n))
                memos[which, n] = _engine.apply_(stage.transform, tensors, stage.param_ndim, params, memo)
            _engine.scale_and_shift_(tensors, stage.scale, stage.bias)

    def _kept(self, table: dict[int, Any]) -> dict[int, Any]:
        """A table by the ids of groups, without what it holds of groups that are gone."""
        for gone in table.keys() - set(map(id, self.param_groups)):
            del table[gone]
        return table

    def _is_declared(self, hook: str) -> bool:
        return hook not in self.__dict__ and getattr(getattr(type(self), hook), "_applies_declared_transform", False)

    def _is_probe(self) -> bool:
        """Whether nothing is asked for but that the state be there: every learning rate and every gradient is zero."""
        lrs = [group.get("lr") for group in self.param_groups]
        for lr in lrs:
            if isinstance(lr, Tensor):
                if lr.device.type != "cpu" or torch.compiler.is_compiling() or lr.numel() != 1 or lr.item() != 0:
                    return False
            elif lr is None or lr != 0:
                return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads or any(g.is_cuda and torch.cuda.is_current_stream_capturing() for g in grads[:1]):
            return False
        if any(_engine.is_sharded(g) for g in grads):
            from rai_toolbox.optim import _sharding

            return _sharding.all_zero(grads)
        return not any(_engine.has_nonzero(g) for g in grads)

    # Options, in the groups.

    def _all_option_keys(self) -> set[str]:
        keys = set(self._option_keys)
        return (
            keys | self.inner_opt._all_option_keys() if isinstance(self.inner_opt, ParamTransformingOptimizer) else keys
        )

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
        group = copied([param_group])[0]
        params = group["params"]
        tensors = [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]
        if all(isinstance(p, Tensor) for p in tensors):  # else torch says what is wrong
            self._check_group({**self.defaults, **group, "params": tensors})
        self.inner_opt.add_param_group(group)


def _equal(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)
