"""Optimizers whose parameters stay in a convex set: projected gradient steps.

`L*ProjectedOptim` normalize the gradient *and* project; `L*BallOptim` and `SimplexOptim` project and leave the
gradient alone.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import SGD

from rai_toolbox.functional._norms import TINY
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number, check_radius, required
from rai_toolbox.optim._transforms import (
    Transform,
    l1_projection,
    l2_projection,
    linf_projection,
    normalization,
    signs,
    simplex_projection,
)
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer


class _InBall(ParamTransformingOptimizer):
    """The option `epsilon`."""

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_radius("epsilon", optim_group)


class _NormalizedInBall(_InBall):
    """The options of the optimizers that normalize by an L1 or L2 norm and project."""

    _p: int

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        epsilon: float | Tensor,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"epsilon": epsilon, "div_by_zero_eps": div_by_zero_eps}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    @property
    def p(self) -> int:
        """The order of the norm that the gradient is divided by."""
        return self._p

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_number("div_by_zero_eps", optim_group["div_by_zero_eps"], low=0.0, high=math.inf)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return normalization(self._p, optim_group["div_by_zero_eps"])


@documented
class L1ProjectedOptim(_NormalizedInBall):
    """Divide each gradient by its L1 norm before the step, and project each parameter on an L1 ball after it.

    The projection is the Euclidean one, the nearest point of the ball [1]_, which makes entries zero; it is not a
    rescaling.

    References
    ----------
    .. [1] J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra, "Efficient projections onto the l1-ball for learning
       in high dimensions", ICML 2008.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1ProjectedOptim
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = L1ProjectedOptim([x], lr=3.0, epsilon=1.0)
    >>> (x * torch.tensor([-4.0, 2.0])).sum().backward()
    >>> optim.step()  # to [2, -1], then to the nearest point of the ball
    >>> x
    tensor([[1., -0.]], requires_grad=True)
    """

    _p = 1

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return l1_projection(optim_group["epsilon"])


@documented
class L2ProjectedOptim(_NormalizedInBall):
    """Divide each gradient by its L2 norm before the step, and project each parameter on an L2 ball after it.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2ProjectedOptim
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = L2ProjectedOptim([x], lr=10.0, epsilon=0.5)
    >>> (x * torch.tensor([-3.0, 4.0])).sum().backward()
    >>> optim.step()  # to [6, -8], then to the nearest point of the ball
    >>> x
    tensor([[ 0.3000, -0.4000]], requires_grad=True)
    """

    _p = 2

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return l2_projection(optim_group["epsilon"])


@documented
class LinfProjectedOptim(_InBall):
    """Replace each gradient by its sign before the step, and clamp each parameter to [-epsilon, epsilon] after it.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfProjectedOptim
    >>> x = torch.zeros(2, requires_grad=True)
    >>> optim = LinfProjectedOptim([x], lr=1.0, epsilon=0.25)
    >>> (x * torch.tensor([-3.0, 4.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([ 0.2500, -0.2500], requires_grad=True)
    """

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        epsilon: float | Tensor,
        param_ndim: int | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"epsilon": epsilon, "param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return signs()

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return linf_projection(optim_group["epsilon"])


class _InBallAndBox(_InBall):
    """The options of the optimizers that project and do nothing else."""

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        epsilon: float | Tensor,
        lower: float | Tensor | None = None,
        upper: float | Tensor | None = None,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"epsilon": epsilon, "lower": lower, "upper": upper}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        for name in ("lower", "upper"):
            bound = optim_group[name]
            if bound is not None and not isinstance(bound, Tensor):
                check_number(name, bound)


@documented
class L1BallOptim(_InBallAndBox):
    """Project each parameter on an L1 ball after the step, or on the part of the ball that lies in a box.

    The gradient is left as it is. The projection is the exact Euclidean one.

    Examples
    --------
    A delta that keeps an image in [0, 1], and moves it by at most 1 in the L1 norm:

    >>> import torch
    >>> from rai_toolbox.optim import L1BallOptim
    >>> image = torch.tensor([[0.9, 0.2]])
    >>> delta = torch.zeros(1, 2, requires_grad=True)
    >>> optim = L1BallOptim([delta], lr=1.0, epsilon=1.0, lower=-image, upper=1 - image)
    >>> (delta * torch.tensor([-3.0, -2.0])).sum().backward()
    >>> optim.step()
    >>> image + delta.detach()
    tensor([[1., 1.]])
    """

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return l1_projection(optim_group["epsilon"], optim_group["lower"], optim_group["upper"])


@documented
class L2BallOptim(_InBallAndBox):
    """Project each parameter on an L2 ball after the step, or on the part of the ball that lies in a box.

    The gradient is left as it is. The projection is the exact Euclidean one.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2BallOptim
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = L2BallOptim([x], lr=1.0, epsilon=0.5)
    >>> (x * torch.tensor([-3.0, 4.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 0.3000, -0.4000]], requires_grad=True)
    """

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return l2_projection(optim_group["epsilon"], optim_group["lower"], optim_group["upper"])


@documented
class LinfBallOptim(_InBallAndBox):
    """Project each parameter on an Linf ball after the step, or on the part of the ball that lies in a box.

    The gradient is left as it is.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfBallOptim
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> optim = LinfBallOptim([x], lr=1.0, epsilon=0.5, lower=0.0)
    >>> (x * torch.tensor([-3.0, 4.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[0.5000, 0.0000]], requires_grad=True)
    """

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return linf_projection(optim_group["epsilon"], optim_group["lower"], optim_group["upper"])


@documented
class SimplexOptim(ParamTransformingOptimizer):
    """Project each parameter on a simplex after the step: entries ≥ 0 whose sum is `total`.

    The gradient is left as it is. The projection is the exact Euclidean one.

    Parameters
    ----------
    total : float or Tensor, default 1.0
        What the entries of a datum sum to, ≥ 0: a number, or one entry per datum. Per group.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SimplexOptim
    >>> x = torch.full((1, 3), 1 / 3, requires_grad=True)
    >>> optim = SimplexOptim([x], lr=1.0)
    >>> (x * torch.tensor([0.0, 0.5, 3.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[0.7500, 0.2500, 0.0000]], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        total: float | Tensor = 1.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"total": total, "param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_radius("total", optim_group)

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return simplex_projection(optim_group["total"])
