"""A step as compiled functions: what `ParamTransformingOptimizer.compile` asks for.

The norms are one graph. All that depends on them is another, in which factors, signs, clamps, the bias and the update
of the inner optimizer become one loop over memory. (In a single graph, torch 2.13's compiler for CPUs does not fuse
them, and fails on some with a KeyError.) Inside a graph float64 costs little, so no norm has to be computed twice:
there the square of an entry of at most 32 bits neither overflows nor underflows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import datum_ndim, is_number
from rai_toolbox.kernels._machine import seen, wide_dtype
from rai_toolbox.optim._inner import named_parameters
from rai_toolbox.optim._plans import GroupPlan
from rai_toolbox.optim._separate import SEPARATE
from rai_toolbox.optim._tensors import scale_and_shift_
from rai_toolbox.optim._torch_private import (
    bare_step,
    compiled,
    compiler_errors,
    foreach_copy_,
    is_flattened,
    is_unobserved,
    not_traced,
    note_step,
)
from rai_toolbox.optim._transforms import ByNorm, Entrywise, Stage

# How many times a step is compiled again, for other kinds of stages or other tensors, before ordinary steps are taken.
_MAX_RECOMPILES = 8


class Compiled:
    """Take steps as compiled functions, once an ordinary first step has made the inner optimizer's state.

    options: keywords of `torch.compile`.
    owner: who asked for it, in warnings.
    """

    def __init__(self, options: dict[str, Any], owner: str) -> None:
        self._options = options
        self._owner = owner
        self._step: CompiledStep | None = None
        self._recompiles = 0

    def accepts(self, plans: Sequence[GroupPlan], inner: Optimizer) -> bool:
        """Return whether there is a compiled step for these stages and tensors; make one for the next step if not."""
        if torch.compiler.is_compiling() or self._recompiles > _MAX_RECOMPILES:
            return False
        if self._step is None:
            self._step = CompiledStep(inner, plans, self._options)
            return False
        if not self._step.holds_for(inner, plans):
            self._recompiles += 1
            if self._recompiles > _MAX_RECOMPILES:
                warnings.warn(
                    f"the options of {self._owner}, or which parameters have a gradient, changed {_MAX_RECOMPILES} "
                    f"times since `compile()`: from now on it takes ordinary steps",
                    RuntimeWarning,
                    stacklevel=4,
                )
                return False
            self._step = CompiledStep(inner, plans, self._options)
        return self._step.accepts()

    @not_traced
    @torch.no_grad()
    def take(self, plans: Sequence[GroupPlan], inner: Optimizer) -> None:
        """Take the step."""
        assert self._step is not None
        failure = self._step.take(plans)
        note_step(inner)
        SEPARATE.change_parameters_at_rest(plans)
        if failure is not None:  # last, after the step: a warning may be raised as an error
            warnings.warn(
                f"torch.compile failed, so {type(inner).__name__} takes ordinary steps:\n{failure}",
                RuntimeWarning,
                stacklevel=7,
            )


class CompiledStep:
    """The compiled step of an optimizer for given stages and tensors; `options` are keywords of `torch.compile`."""

    def __init__(self, inner: Optimizer, plans: Sequence[GroupPlan], options: dict[str, Any]) -> None:
        self._inner = inner
        params = [[p for p in plan.params if p.numel()] for plan in plans]
        self._params = list(itertools.chain(*params))
        self._forms = list(map(_form, self._params))
        self._plans_forms = [plan.forms for plan in plans]
        self._possible = (
            bare_step(inner) is not None
            and bool(self._params)
            and all(map(_takes, self._params))
            and all(_kinds(plan) == _kinds(plans[0]) for plan in plans)
            and None not in itertools.chain(*_kinds(plans[0]))
        )
        if self._possible:
            device = self._params[0].device
            own = set().union(*(named_parameters(cls.__init__) for cls in type(inner).__mro__))
            self._numbers = [Numbers(plan, device, own) for plan in plans]
            # A step is a sequence of operations, `_line`: each is a stage for every parameter, or None for the update.
            stages = [numbers.stages for numbers, group in zip(self._numbers, params, strict=True) for _ in group]
            self._line: list[tuple[Stage, ...] | None] = list(zip(*stages, strict=True))
            self._at_update = len(plans[0].before)
            self._line.insert(self._at_update, None)
            edges = [0, *(i for i, op in enumerate(self._line) if i and _is_by_norm(op)), len(self._line)]
            self._parts = [
                (start, _part(inner, self._line[start:stop], start <= self._at_update, self._params, options))
                for start, stop in itertools.pairwise(edges)
            ]

    def holds_for(self, inner: Optimizer, plans: Sequence[GroupPlan]) -> bool:
        """Return whether this was made for these parameters, of these shapes and strides, and for such stages."""
        params = [p for plan in plans for p in plan.params if p.numel()]
        return (
            inner is self._inner
            and list(map(id, params)) == list(map(id, self._params))
            and [plan.forms for plan in plans] == self._plans_forms
            and list(map(_form, params)) == self._forms
        )

    def accepts(self) -> bool:
        """Return whether the step can be taken now."""
        return self._possible and is_unobserved(self._inner) and all(_takes(p.grad) for p in self._params)

    def take(self, plans: Sequence[GroupPlan]) -> Exception | None:
        """Take the step; return the compiler's error, if it failed."""
        grads: list[Any] = [p.grad for p in self._params]
        for numbers, plan in zip(self._numbers, plans, strict=True):
            numbers.refill(plan)
        failure = None
        for start, part in self._parts:
            try:
                with self._groups_of_its_own():
                    done = part(grads)
            except compiler_errors() as error:  # while compiling: nothing of this part was done
                done, failure = False, error
                self._possible = False
            if not done:
                self._finish(start, grads, plans)
                break
        return failure

    @contextmanager
    def _groups_of_its_own(self) -> Iterator[None]:
        """Let the inner optimizer see its own options alone, with tensors for learning rates."""
        groups = self._inner.param_groups
        try:
            self._inner.param_groups = [numbers.inner_group for numbers in self._numbers]
            yield
        finally:
            self._inner.param_groups = groups

    def _finish(self, start: int, grads: list[Any], plans: Sequence[GroupPlan]) -> None:
        """Take the rest of the step without a compiler."""
        for i in range(start, len(self._line)):
            if i == self._at_update:
                self._inner.step()
                continue
            xs = iter(grads if i < self._at_update else self._params)
            for plan in plans:
                stage = plan.before[i] if i < self._at_update else plan.after[i - 1 - self._at_update]
                for x in itertools.islice(xs, sum(p.numel() > 0 for p in plan.params)):
                    if stage.transform is not None:
                        stage.transform.change_([x], [datum_ndim(x.ndim, stage.param_ndim)])
                    scale_and_shift_([x], stage.scale, stage.bias)


def _part(
    inner: Optimizer,
    line: Sequence[tuple[Stage, ...] | None],
    begins_before_update: bool,
    params: list[Tensor],
    options: dict[str, Any],
) -> Callable[[list[Any]], bool]:
    """Return a function of the gradients that does some operations of a step.

    It returns False, and does nothing, where a norm is not finite. It must not refer to the `CompiledStep`, which
    refers to it: the cycle would keep the inner optimizer alive.
    """
    update: Any = bare_step(inner)
    begins_with_norm = _is_by_norm(line[0])
    looks = bool(seen(lambda: True, params[0]))

    def measure(xs: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        norms = [_norms(x, stage) for x, stage in zip(xs, line[0] or (), strict=True)]
        total = torch.stack([n.sum() for n in norms]).sum() if looks else None
        return [_factors(n, x, stage) for n, x, stage in zip(norms, xs, line[0] or (), strict=True)], total

    def change(grads: list[Tensor], params: list[Tensor], factors: list[Tensor] | None) -> None:
        old = new = grads if begins_before_update else params
        for i, stages in enumerate(line):
            if stages is None:
                _write(old, new)
                update(inner)
                old = new = params
            elif i == 0 and factors is not None:
                new = [_shifted((x * f).to(x.dtype), s) for x, f, s in zip(new, factors, stages, strict=True)]
            else:
                new = [_shifted(_changed(x, s), s) for x, s in zip(new, stages, strict=True)]
        _write(old, new)

    measure_, change_ = compiled(measure, options), compiled(change, options)

    def run(grads: list[Any]) -> bool:
        factors = None
        if begins_with_norm:
            factors, total = measure_(grads if begins_before_update else params)
            if total is not None and not math.isfinite(total.item()):
                return False
        change_(grads, params, factors)
        return True

    return run


class Numbers:
    """The numbers of a group as 0-d tensors, so that another number is no reason to compile again.

    stages: the stages of the group, with tensors for numbers.
    inner_group: the group without numbers that are not the inner optimizer's, and with a tensor for the learning rate
        where that one takes a tensor.
    """

    def __init__(self, plan: GroupPlan, device: torch.device, own: set[str]) -> None:
        self._tensors: list[Tensor] = []
        self._values: list[float] = []

        def tensor(value: float, device: torch.device = device) -> Tensor:
            self._tensors.append(torch.full((), value, dtype=torch.float64, device=device))
            self._values.append(value)
            return self._tensors[-1]

        self.stages = [_with_numbers(stage, tensor) for stage in (*plan.before, *plan.after)]
        group = plan.group
        self.inner_group = {k: v for k, v in group.items() if k in own or not is_number(v)}
        self._lr = None
        if is_number(group.get("lr")) and not (group.get("foreach") or group.get("fused")):
            self._lr = tensor(float(group["lr"]), torch.device("cpu"))

    def refill(self, plan: GroupPlan) -> None:
        """Fill in the group's present numbers."""
        values: list[float] = []
        for stage in (*plan.before, *plan.after):
            _with_numbers(stage, values.append)
        self.inner_group.update({key: plan.group[key] for key in self.inner_group})
        if self._lr is not None:
            values.append(float(plan.group["lr"]))
            self.inner_group["lr"] = self._lr
        for x, old, new in zip(self._tensors, self._values, values, strict=True):
            if old != new:
                x.fill_(new)
        self._values = values


def _with_numbers(stage: Stage, tensor: Callable[[float], Any]) -> Stage:
    """Return the stage with `tensor(number)` in place of every number but a scale of 1 and a bias of 0."""
    transform = stage.transform
    if isinstance(transform, ByNorm):
        factor = transform.factor
        scale = factor.scale if factor.scale == 1 else tensor(factor.scale)  # pyright: ignore[reportArgumentType]
        bound = tensor(factor.bound)  # pyright: ignore[reportArgumentType]
        transform = ByNorm(dataclasses.replace(factor, bound=bound, scale=scale))
    elif isinstance(transform, Entrywise):
        low, high = (None if bound is None else tensor(bound) for bound in (transform.low, transform.high))
        transform = dataclasses.replace(transform, low=low, high=high)
    scale = 1.0 if stage.scale == 1 else tensor(stage.scale)
    bias = 0.0 if stage.bias == 0 else tensor(stage.bias)
    return Stage(transform, stage.param_ndim, scale, bias)


def _kinds(plan: GroupPlan) -> list[list[type | None]]:
    return [list(map(_kind, stages)) for stages in (plan.before, plan.after)]


def _takes(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and wide_dtype(x) == torch.float64
        and _is_dense(x)
        and not is_flattened(x)
    )


def _is_dense(x: Tensor) -> bool:
    """Whether the entries of `x` fill a stretch of memory: no place is used twice, none is left out."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _kind(stage: Stage) -> type | None:
    """`ByNorm`, `Entrywise` (also of a stage that only scales), or None for any other, which is not compiled."""
    if stage.transform is None or isinstance(stage.transform, Entrywise):
        return Entrywise
    return ByNorm if isinstance(stage.transform, ByNorm) else None


def _is_by_norm(op: tuple[Stage, ...] | None) -> bool:
    return bool(op) and isinstance(op[0].transform, ByNorm)


# What is traced.


def _norms(x: Tensor, stage: Stage) -> Tensor:
    k = datum_ndim(x.ndim, stage.param_ndim)
    assert isinstance(stage.transform, ByNorm)
    p, x = stage.transform.p, x.to(torch.float64)
    if k == 0:
        return x.abs()
    dims = tuple(range(x.ndim - k, x.ndim))
    if p in (1, 2, math.inf):
        return torch.linalg.vector_norm(x, p, dims, True)
    a = x.abs().amax(dims, True)
    a = torch.where(a == 0, 1.0, a)
    return torch.linalg.vector_norm(x / a, p, dims, True) * a


def _factors(norms: Tensor, x: Tensor, stage: Stage) -> Tensor:
    assert isinstance(stage.transform, ByNorm)
    numel = x.numel() // max(1, norms.numel())
    factors = stage.transform.factor.of_(norms.flatten().clone(), x.dtype, numel).reshape(norms.shape)
    return torch.where(norms == 0, 1.0, factors)  # zero times infinity would be NaN


def _changed(x: Tensor, stage: Stage) -> Tensor:
    if not isinstance(stage.transform, Entrywise):
        return x
    if stage.transform.kind == "sign":
        return x.sign()
    largest = torch.finfo(x.dtype).max
    bounds: Any = stage.transform.low, stage.transform.high
    low, high = (
        None if b is None else torch.where(b.isinf(), b, b.clamp(-largest, largest)).to(x.dtype) for b in bounds
    )
    return x.clamp(low, high)


def _shifted(x: Tensor, stage: Stage) -> Tensor:
    if isinstance(stage.scale, Tensor):
        x = x * stage.scale
    return x + stage.bias if isinstance(stage.bias, Tensor) else x


def _write(old: list[Tensor], new: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a is not b]
    if pairs:
        foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
