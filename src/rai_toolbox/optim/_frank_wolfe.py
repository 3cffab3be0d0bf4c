"""Frank-Wolfe: steps towards the point of a ball that a linear minimization oracle names.

References
----------
.. [1] M. Frank and P. Wolfe, "An algorithm for quadratic programming", Naval Research Logistics Quarterly 3, 1956.
.. [2] M. Jaggi, "Revisiting Frank-Wolfe: projection-free sparse convex optimization", ICML 2013.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._norms import TINY
from rai_toolbox.kernels._machine import kind_of
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number, check_radius, required
from rai_toolbox.optim._random import Draws
from rai_toolbox.optim._sharding import own_parts
from rai_toolbox.optim._sparse import check_selection
from rai_toolbox.optim._tensors import is_sharded
from rai_toolbox.optim._torch_private import foreach_add_, foreach_mul_, foreach_zero_
from rai_toolbox.optim._transforms import Transform, negated_l1_vertex, normalization, signed_selection, signs
from rai_toolbox.optim._wrapper import OptimGroup, OptimParams, ParamTransformingOptimizer


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
            lr = _checked_lr(group)
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            for state in states:
                if "step" not in state:
                    state["step"] = torch.tensor(0.0, device="cpu")
            if lr == 0 or not params:  # no step: the counts do not advance
                continue
            counts = [state["step"] for state in states]
            alike: dict[float, list[Tensor]] = {}
            for p, k in zip(params, [float(count.item()) for count in counts], strict=True):
                alike.setdefault(k, []).append(p)
            if any(map(Tensor.is_inference, counts)):  # made in inference mode, so that they cannot be changed
                for state in states:
                    state["step"] = state["step"] + 1
            else:  # a list of tensors takes a fourth of the time that a number takes
                foreach_add_(counts, [torch.ones_like(counts[0])] * len(counts))
            for k, members in alike.items():
                self._move_(members, lr / (lr + k) if group["use_default_lr_schedule"] else lr, group)
        return loss

    def _move_(self, params: list[Tensor], a: float, group: dict[str, Any]) -> None:
        """Move parameters by the share `a` of the way to their oracles."""
        together = [p for p in params if type(p.grad) is Tensor and p.grad.layout is torch.strided]
        lists = [together] if together else []
        if len(together) < len(params):  # sharded and sparse ones go one by one
            lists += [[p] for p in params if not (type(p.grad) is Tensor and p.grad.layout is torch.strided)]
        radius = group[self._radius]
        for xs in lists:
            if a == 1:
                _each(foreach_zero_, Tensor.zero_, xs)  # not a multiplication by 0: an infinity that was held is gone
            else:
                _each(foreach_mul_, Tensor.mul_, xs, _factor(1 - a, xs))
            if isinstance(radius, Tensor):
                for p in xs:
                    _add_product_(p, p.grad, _per_datum(radius, p, group["param_ndim"]) * -a)
            elif len(xs) > 1:
                foreach_add_(xs, [p.grad for p in xs], alpha=radius * -a)
            else:
                xs[0].add_(xs[0].grad, alpha=radius * -a)  # pyright: ignore[reportArgumentType]


def _each(foreach_: Any, one_: Any, xs: list[Tensor], *args: Any) -> None:
    if len(xs) > 1:
        foreach_(xs, *args)
    else:
        one_(xs[0], *args)


def _factor(number: float, xs: list[Tensor]) -> float | Tensor:
    """Return what multiplies a list of tensors by a number: the same bits, on a CPU in a fourth of the time."""
    kinds = {(x.dtype, kind_of(x.device)) for x in xs}
    if len(xs) > 1 and kinds in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        return torch.tensor(number, dtype=xs[0].dtype, device="cpu")
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


def _checked_lr(group: OptimGroup) -> float:
    lr = group["lr"]
    value: Any = lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr
    check_number("lr", value, low=0.0, high=math.inf if group["use_default_lr_schedule"] else 1.0)
    return value


class _FrankWolfeOnBall(FrankWolfe):
    """The inner optimizer of the families below: the radius is the option `epsilon`, a number or one per datum."""

    _radius = "epsilon"


class _OnBall(ParamTransformingOptimizer):
    """The options of Frank-Wolfe on a ball."""

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams,
        *,
        epsilon: float | Tensor,
        lr: float = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
    ) -> None:
        self._init(params, {"epsilon": epsilon}, lr, use_default_lr_schedule, param_ndim, div_by_zero_eps)

    def _init(
        self,
        params: OptimParams,
        options: dict[str, Any],
        lr: float,
        use_default_lr_schedule: bool,
        param_ndim: int | None,
        div_by_zero_eps: float,
    ) -> None:
        inner = functools.partial(
            _FrankWolfeOnBall,
            lr=lr,
            use_default_lr_schedule=use_default_lr_schedule,
            div_by_zero_eps=div_by_zero_eps,
        )
        super().__init__(params, inner, param_ndim=param_ndim, defaults=options)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_radius("epsilon", optim_group)


@documented
class L1FrankWolfe(_OnBall):
    """Minimize over an L1 ball: each step moves one entry of each datum.

    The oracle is ±epsilon on the one entry of largest magnitude of each datum of the gradient.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1FrankWolfe
    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> optim = L1FrankWolfe([x], epsilon=0.5)
    >>> (x * torch.tensor([1.0, -3.0, 2.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[0.0000, 0.5000, 0.0000]], requires_grad=True)
    """

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return negated_l1_vertex()


@documented
class L2FrankWolfe(_OnBall):
    """Minimize over an L2 ball: each step moves along the normalized gradient.

    The oracle is -epsilon·g/‖g‖2 for each datum g of the gradient.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2FrankWolfe
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = L2FrankWolfe([x], epsilon=0.5)
    >>> (x * torch.tensor([3.0, -4.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[-0.3000,  0.4000]], requires_grad=True)
    """

    @property
    def p(self) -> int:
        """The order of the norm that the gradient is divided by: 2."""
        return 2

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return normalization(self.p, optim_group["div_by_zero_eps"])


@documented
class LinfFrankWolfe(_OnBall):
    """Minimize over an Linf ball: each step moves every entry towards a corner.

    The oracle is -epsilon·sign(g).

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfFrankWolfe
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = LinfFrankWolfe([x], epsilon=0.5)
    >>> (x * torch.tensor([3.0, -4.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[-0.5000,  0.5000]], requires_grad=True)
    """

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return signs()


@documented
class L1qFrankWolfe(_OnBall):
    """Minimize over an L1 ball in steps that move several entries: less sparse than `L1FrankWolfe`.

    The oracle is ±epsilon/k on the k entries of largest magnitude of each datum of the gradient.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1qFrankWolfe
    >>> x = torch.zeros(1, 4, requires_grad=True)
    >>> optim = L1qFrankWolfe([x], q=0.5, epsilon=1.0)
    >>> (x * torch.tensor([1.0, -3.0, 2.0, 0.5])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 0.0000,  0.5000, -0.5000,  0.0000]], requires_grad=True)
    """

    @required("q", "epsilon")
    def __init__(
        self,
        params: OptimParams,
        *,
        q: float,
        epsilon: float | Tensor,
        dq: float = 0.0,
        lr: float = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
        generator: Generator = torch.default_generator,
    ) -> None:
        self._draws = Draws(generator)
        options = {"epsilon": epsilon, "q": q, "dq": dq}
        self._init(params, options, lr, use_default_lr_schedule, param_ndim, div_by_zero_eps)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_selection(optim_group)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return signed_selection(*self._draws.share(optim_group))
