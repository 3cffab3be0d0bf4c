"""Frank-Wolfe on a ball: each family computes an oracle, the step is that of `_frank_wolfe_step.py`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Generator, Tensor

from rai_toolbox.functional._norms import TINY
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._frank_wolfe_step import FrankWolfe as FrankWolfe  # where pickles look for it
from rai_toolbox.optim._frank_wolfe_step import _FrankWolfeOnBall
from rai_toolbox.optim._options import check_radius, required
from rai_toolbox.optim._random import Draws
from rai_toolbox.optim._sparse import check_selection
from rai_toolbox.optim._transforms import Transform, negated_l1_vertex, normalization, signed_selection, signs
from rai_toolbox.optim._wrapper import OptimGroup, OptimParams, ParamTransformingOptimizer


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
