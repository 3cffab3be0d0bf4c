"""The step of Frank-Wolfe: a share of the way to the point that a linear minimization oracle names.

References
----------
.. [1] M. Frank and P. Wolfe, "An algorithm for quadratic programming", Naval Research Logistics Quarterly 3, 1956.
.. [2] M. Jaggi, "Revisiting Frank-Wolfe: projection-free sparse convex optimization", ICML 2013.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import datum_ndim, is_number
from rai_toolbox.functional._norms import TINY
from rai_toolbox.kernels._machine import is_on_cpu
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._inner import OptimParams
from rai_toolbox.optim._options import check_number
from rai_toolbox.optim._sharded_gradients import own_parts
from rai_toolbox.optim._tensors import is_sharded
from rai_toolbox.optim._torch_private import foreach_add_, foreach_mul_, foreach_zero_, is_unobserved


@documented
class FrankWolfe(Optimizer):
    """Step towards the point that a linear minimization oracle has left, negated, in the gradient.

    With s the oracle, `param.grad` = -s, the k-th update (from 0) of a parameter x is

        x ← (1 - a) x + a s · lmo_scaling_factor,    a = lr / (lr + k),

    or a = lr without the default schedule. A convex combination of points of a convex set lies in the set, so no
    projection is needed; on a smooth convex function the default schedule comes within O(1/k) of the minimum [1]_.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        Parameters or parameter groups.
    lmo_scaling_factor : float, default 1.0
        Multiplies the oracle: the radius of the set. Per group.
    div_by_zero_eps : float, default 1.1754943508222875e-38
        Kept in the groups for the wrappers that compute an oracle.

    Raises
    ------
    TypeError
        An option is not a number.
    ValueError
        `lr` is negative, or exceeds 1 without the default schedule.

    References
    ----------
    .. [1] M. Jaggi, "Revisiting Frank-Wolfe: projection-free sparse convex optimization", ICML 2013.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import FrankWolfe
    >>> x = torch.zeros(2, requires_grad=True)
    >>> optim = FrankWolfe([x], lr=0.25, use_default_lr_schedule=False)
    >>> x.grad = torch.tensor([-1.0, 0.0])  # the negative of the oracle
    >>> optim.step()
    >>> x
    tensor([0.2500, 0.0000], requires_grad=True)
    """

    _radius = "lmo_scaling_factor"  # the option that it is

    def __init__(
        self,
        params: OptimParams,
        *,
        lr: float = 2.0,
        lmo_scaling_factor: float = 1.0,
        use_default_lr_schedule: bool = True,
        div_by_zero_eps: float = TINY,
    ) -> None:
        defaults = {
            "lr": lr,
            "lmo_scaling_factor": lmo_scaling_factor,
            "use_default_lr_schedule": use_default_lr_schedule,
            "div_by_zero_eps": div_by_zero_eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        options = {**self.defaults, **param_group}
        _checked_lr(options)
        for name, low in (("lmo_scaling_factor", -math.inf), ("div_by_zero_eps", 0.0)):
            check_number(name, options[name], low=low)
        if not isinstance(options["use_default_lr_schedule"], bool):
            raise TypeError(f"`use_default_lr_schedule` must be a bool, got {options['use_default_lr_schedule']!r}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient towards its oracle.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss.

        Returns
        -------
        object
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params, a in self._count(group):
                self._move_(params, a, group)
        return loss

    def _count(self, group: dict[str, Any]) -> list[tuple[list[Tensor], float]]:
        """Count a step of the parameters that have a gradient; return those at each count, and how far they go."""
        lr = _checked_lr(group)
        params = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        for state in states:
            if "step" not in state:
                state["step"] = torch.tensor(0.0, device="cpu")
        if lr == 0 or not params:  # no step: the counts do not advance
            return []
        counts = [state["step"] for state in states]
        numbers = [float(count.item()) for count in counts]
        alike: dict[float, list[Tensor]] = {}
        if len(set(numbers)) == 1:
            alike[numbers[0]] = params
        else:
            for p, k in zip(params, numbers, strict=True):
                alike.setdefault(k, []).append(p)
        if any(map(Tensor.is_inference, counts)):  # made in inference mode, so that they cannot be changed
            for state in states:
                state["step"] = state["step"] + 1
        else:  # a list of tensors takes a fourth of the time that a number takes
            foreach_add_(counts, [torch.ones_like(counts[0])] * len(counts))
        return [(members, lr / (lr + k) if group["use_default_lr_schedule"] else lr) for k, members in alike.items()]

    def _move_(self, params: list[Tensor], a: float, group: dict[str, Any]) -> None:
        """Move parameters by the share `a` of the way to their oracles."""
        grads: list[Any] = [p.grad for p in params]
        is_plain = [type(g) is Tensor and g.layout is torch.strided for g in grads]
        lists = [(params, grads)]
        if not all(is_plain):  # sharded and sparse ones go one by one
            pairs = list(zip(params, grads, strict=True))
            together = list(itertools.compress(pairs, is_plain))
            lists = [([p], [g]) for (p, g), plain in zip(pairs, is_plain, strict=True) if not plain]
            if together:
                lists.insert(0, ([p for p, _ in together], [g for _, g in together]))
        radius = group[self._radius]
        for xs, gs in lists:
            if a == 1:
                _each(foreach_zero_, Tensor.zero_, xs)  # not a multiplication by 0: an infinity that was held is gone
            else:
                _each(foreach_mul_, Tensor.mul_, xs, _factor(1 - a, xs))
            if isinstance(radius, Tensor):
                for p, g in zip(xs, gs, strict=True):
                    _add_product_(p, g, _per_datum(radius, p, group["param_ndim"]) * -a)
            elif len(xs) > 1:
                foreach_add_(xs, gs, alpha=radius * -a)
            else:
                xs[0].add_(gs[0], alpha=radius * -a)


def _each(foreach_: Any, one_: Any, xs: list[Tensor], *args: Any) -> None:
    if len(xs) > 1:
        foreach_(xs, *args)
    else:
        one_(xs[0], *args)


def _factor(number: float, xs: list[Tensor]) -> float | Tensor:
    """Return what multiplies a list of tensors by a number: the same bits, on a CPU in a fourth of the time."""
    dtype = xs[0].dtype
    if len(xs) > 1 and dtype in (torch.float32, torch.float64) and {x.dtype for x in xs} == {dtype} and is_on_cpu(*xs):
        return torch.tensor(number, dtype=dtype, device="cpu")
    return number


def _per_datum(radius: Tensor, p: Tensor, param_ndim: int | None) -> Tensor:
    """Return radii, one or one per datum, as a tensor that broadcasts to `p`."""
    k = datum_ndim(p.ndim, param_ndim)
    batch = p.shape[: p.ndim - k]
    radius = radius.reshape(batch) if radius.numel() == batch.numel() else radius.expand(batch)
    return radius.to(p).reshape(*batch, *(1,) * k)


def _add_product_(p: Tensor, grad: Any, factors: Tensor) -> None:
    """p += grad * factors, where every rank has all factors, and perhaps only a part of `p` and `grad`."""
    if is_sharded(p):
        p, grad, factors = own_parts(p, grad, factors)
    p.addcmul_(grad, factors)


def _checked_lr(group: Mapping[str, Any]) -> float:
    lr = group["lr"]
    value: Any = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    check_number("lr", value, low=0.0, high=math.inf if group["use_default_lr_schedule"] else 1.0)
    return value


class _FrankWolfeOnBall(FrankWolfe):
    """The inner optimizer of the families below: the radius is the option `epsilon`, a number or one per datum."""

    _radius = "epsilon"


def takes_bare_steps(inner: Optimizer) -> bool:
    """Return whether `inner` is Frank-Wolfe, with no hooks and no patches, and a number as its radius and `lr`."""
    return (
        isinstance(inner, FrankWolfe)
        and type(inner) in (FrankWolfe, _FrankWolfeOnBall)
        and is_unobserved(inner)
        and not torch.compiler.is_compiling()
        and all(_has_numbers(group, inner._radius) for group in inner.param_groups)
    )


def _has_numbers(group: Mapping[str, Any], radius: str) -> bool:
    return is_number(group["lr"]) and group["lr"] > 0 and is_number(group[radius])


def shares(inner: Optimizer, group: dict[str, Any]) -> list[tuple[list[Tensor], float, float]]:
    """Count a step; return parameters with what of them stays, and what multiplies their gradients before these go."""
    assert isinstance(inner, FrankWolfe)
    radius = group[inner._radius]
    return [(params, 1 - a, radius * a) for params, a in inner._count(group)]
