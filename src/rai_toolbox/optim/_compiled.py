"""A step as compiled functions: what `ParamTransformingOptimizer.compile` asks for.

Norms are one graph; what waits for them is another, in which factors, signs, clamps, the bias and the update of the
inner optimizer become one loop over memory. (Together, torch 2.13's compiler for CPUs does not fuse them, and fails on
some with a KeyError.) Inside a graph float64 costs little, so norms are right without a second look: no square of an
entry of at most 32 bits leaves its range.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.optim import _engine
from rai_toolbox.optim._inner import bare_step, is_unobserved
from rai_toolbox.optim._one_pass import Stage
from rai_toolbox.optim._transforms import ByNorm, Entrywise


@dataclasses.dataclass(frozen=True)
class Group:
    """The parameters of a group that have a gradient, and what becomes of their gradients and then of them."""

    params: list[Tensor]
    before: list[Stage]
    after: list[Stage]

    def kinds(self) -> list[list[type | None]]:
        """The kinds of the stages."""
        return [list(map(_kind, stages)) for stages in (self.before, self.after)]

    def is_as(self, other: Group) -> bool:
        """Whether these are the same objects."""
        pairs = ((self.params, other.params), (self.before, other.before), (self.after, other.after))
        return all(len(mine) == len(theirs) and all(map(operator.is_, mine, theirs)) for mine, theirs in pairs)


class CompiledStep:
    """The compiled step of an optimizer with given groups; `options` are keywords of `torch.compile`."""

    def __init__(self, inner: Optimizer, groups: list[Group], options: dict[str, Any]) -> None:
        self._inner = inner
        self._groups = groups
        self._params = [p for group in groups for p in group.params]
        self._forms = list(map(_form, self._params))
        kinds = groups[0].kinds()
        self._possible = (
            bare_step(inner) is not None
            and bool(self._params)
            and all(map(_takes, self._params))
            and all(group.kinds() == kinds for group in groups)
            and None not in (*kinds[0], *kinds[1])
        )
        if self._possible:
            # A step is a line of operations: a stage for each parameter, or None, the update.
            stages = [(*group.before, *group.after) for group in groups for _ in group.params]
            self._line: list[tuple[Stage, ...] | None] = list(zip(*stages, strict=True))
            self._at_update = len(kinds[0])
            self._line.insert(self._at_update, None)
            edges = [0, *(i for i, op in enumerate(self._line) if i and _is_by_norm(op)), len(self._line)]
            self._parts = [(start, self._part(start, stop, options)) for start, stop in itertools.pairwise(edges)]

    def holds_for(self, inner: Optimizer, groups: list[Group]) -> bool:
        """Whether it was made for these parameters, with the memory that they have, and these stages."""
        return (
            inner is self._inner
            and len(groups) == len(self._groups)
            and all(map(Group.is_as, groups, self._groups))
            and list(map(_form, self._params)) == self._forms
        )

    def take(self) -> bool:
        """Take the step, or return False and change nothing."""
        grads: list[Any] = [p.grad for p in self._params]
        if not (self._possible and is_unobserved(self._inner) and all(map(_takes, grads))):
            return False
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, and is there by now

        failure = None
        for start, part in self._parts:
            try:
                done = part(grads)
            except TorchDynamoException as error:  # while compiling: nothing of this part was done
                done, failure = False, error
            if not done:
                self._finish(start, grads)
                break
        if failure is not None:  # said at the end: a warning may be an error
            self._possible = False
            warnings.warn(
                f"torch.compile failed, so {type(self._inner).__name__} takes ordinary steps:\n{failure}",
                RuntimeWarning,
                stacklevel=6,
            )
        return True

    def _part(self, start: int, stop: int, options: dict[str, Any]) -> Callable[[list[Any]], bool]:
        """The operations from `start` to `stop`; False, and nothing is done, where norms are not finite."""
        inner, line = self._inner, self._line[start:stop]
        update: Any = bare_step(inner)
        begins_with_norm = _is_by_norm(line[0])

        def measure(xs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            norms = [_norms(x, stage) for x, stage in zip(xs, line[0] or (), strict=True)]
            factors = [_factors(n, x, stage) for n, x, stage in zip(norms, xs, line[0] or (), strict=True)]
            return factors, torch.stack([n.sum() for n in norms]).sum()

        def change(grads: list[Tensor], params: list[Tensor], factors: list[Tensor] | None) -> None:
            old = new = grads if start <= self._at_update else params
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

        options = {"fullgraph": True, **options}  # a part is done or it is not
        measure_: Any = torch.compile(_with_own_code(measure), **options)
        change_: Any = torch.compile(_with_own_code(change), **options)

        def run(grads: list[Any]) -> bool:
            factors = None
            if begins_with_norm:
                factors, total = measure_(grads if start < self._at_update else self._params)
                if total.device.type == "cpu" and not math.isfinite(total.item()):
                    return False
            change_(grads, self._params, factors)
            return True

        return run

    def _finish(self, start: int, grads: list[Any]) -> None:
        """The rest of the step, as it is taken without a compiler."""
        for i, stages in enumerate(self._line[start:], start):
            if stages is None:
                self._inner.step()
                continue
            for x, p, stage in zip(grads if i < self._at_update else self._params, self._params, stages, strict=True):
                if stage.transform is not None:
                    _engine.apply_(stage.transform, [x], stage.param_ndim, [p])
                _engine.scale_and_shift_([x], stage.scale, stage.bias)


def _takes(x: Tensor) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.device.type != "mps"  # which has no float64
        and _is_dense(x)
        and not getattr(x, "_fsdp_flattened", False)
    )


def _is_dense(x: Tensor) -> bool:
    """Whether every place of a stretch of memory is one entry of `x`: nothing is expanded, nothing left out."""
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
    """`ByNorm`, `Entrywise` (also of a stage that only scales), or None where there is nothing to gain."""
    if stage.transform is None or isinstance(stage.transform, Entrywise):
        return Entrywise
    return ByNorm if isinstance(stage.transform, ByNorm) else None


def _is_by_norm(op: tuple[Stage, ...] | None) -> bool:
    return bool(op) and isinstance(op[0].transform, ByNorm)


def _with_own_code(function: Callable[..., Any]) -> types.FunctionType:
    """Return a copy of `function` whose compilations do not count against those of other optimizers.

    torch counts them for each code object, up to a limit.
    """
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


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
    if isinstance(stage.transform, Entrywise):
        x = x.clone()
        stage.transform.apply_([x])
    return x


def _shifted(x: Tensor, stage: Stage) -> Tensor:
    if stage.scale != 1:
        x = x * stage.scale
    return x if stage.bias == 0 else x + stage.bias


def _write(old: list[Tensor], new: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a is not b]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])  # pyright: ignore
