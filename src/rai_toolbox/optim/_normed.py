"""Optimizers that step along a normalized gradient: steepest descent under a norm."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch.optim import SGD

from rai_toolbox.functional._norms import TINY, check_order
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number, required
from rai_toolbox.optim._transforms import Transform, normalization, signs
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer


@documented
class LpNormedGradientOptim(ParamTransformingOptimizer):
    """Divide each gradient by its Lp norm before the step.

    The gradient g of a datum becomes g / max(‖g‖p, div_by_zero_eps), correct to a few ulp for every finite g.

    Parameters
    ----------
    p : float
        The order of the norm, p ≥ 1. A subclass that sets the class attribute `_p` takes no `p`. Per group.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LpNormedGradientOptim
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = LpNormedGradientOptim([x], p=3, lr=1.0)
    >>> (x * torch.tensor([3.0, 3.0])).sum().backward()
    >>> optim.step()
    >>> x.grad
    tensor([[0.7937, 0.7937]])
    """

    _p: ClassVar[float | None] = None

    @required("p")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        p: float,
        param_ndim: int | None = -1,
        defaults: dict[str, Any] | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {"div_by_zero_eps": div_by_zero_eps}
        if self._p is None:
            own["p"] = p
        elif p is not None:
            raise TypeError(f"{type(self).__name__} has the order {self._p} and takes no `p`")
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    @property
    def p(self) -> float:
        """The order of the norm, in every group that does not have another."""
        return self._view(self.defaults)["p"] if self._p is None else self._p

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_number("div_by_zero_eps", optim_group["div_by_zero_eps"], low=0.0, high=math.inf)
        p = optim_group.get("p") if self._p is None else self._p
        if p is None:
            raise TypeError(
                f"{type(self).__name__} needs the order of its norm: the keyword `p`, or a class attribute `_p`"
            )
        check_order(p)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        p = optim_group["p"] if self._p is None else self._p
        return normalization(p, optim_group["div_by_zero_eps"])


class _FixedOrder(LpNormedGradientOptim):
    """The options of an optimizer whose class says which norm it is."""

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        param_ndim: int | None = -1,
        defaults: dict[str, Any] | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        div_by_zero_eps: float = TINY,
        **kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"div_by_zero_eps": div_by_zero_eps}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **kwargs)


@documented
class L1NormedGradientOptim(_FixedOrder):
    """Divide each gradient by its L1 norm before the step.

    The gradient g of a datum becomes g / max(‖g‖1, div_by_zero_eps), correct to a few ulp for every finite g.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1NormedGradientOptim
    >>> x = torch.zeros(2, 2, requires_grad=True)
    >>> optim = L1NormedGradientOptim([x], lr=1.0)
    >>> (x * torch.tensor([[1.0, 3.0], [0.0, 0.0]])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[-0.2500, -0.7500],
            [ 0.0000,  0.0000]], requires_grad=True)
    """

    _p = 1


@documented
class L2NormedGradientOptim(_FixedOrder):
    """Divide each gradient by its L2 norm before the step.

    The gradient g of a datum becomes g / max(‖g‖2, div_by_zero_eps), correct to a few ulp for every finite g.

    Examples
    --------
    One datum is the whole tensor (`param_ndim=None`), and the step is plain SGD with a learning rate of 1:

    >>> import torch as tr
    >>> from rai_toolbox.optim import L2NormedGradientOptim
    >>> x = tr.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L2NormedGradientOptim([x], param_ndim=None, InnerOpt=tr.optim.SGD, lr=1.0)
    >>> (tr.tensor([2.0, 2.0]) * x).sum().backward()
    >>> x.grad # the un-normed gradient
    tensor([2., 2.])

    The step normalizes the gradient in place, and then takes the step of SGD:

    >>> optim.step()
    >>> x.grad # the normalized gradient
    tensor([0.7071, 0.7071])
    >>> x  # the updated parameter
    tensor([-1.7071,  0.2929], requires_grad=True)
    """

    _p = 2


@documented
class SignedGradientOptim(ParamTransformingOptimizer):
    """Replace each gradient by its sign before the step: steepest descent under the Linf norm.

    The sign is that of `torch.sign`: zero for NaN, so that such an entry does not move.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SignedGradientOptim
    >>> x = torch.zeros(3, requires_grad=True)
    >>> optim = SignedGradientOptim([x], lr=0.5)
    >>> (x * torch.tensor([1e-30, 0.0, -7.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([-0.5000,  0.0000,  0.5000], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return signs()
