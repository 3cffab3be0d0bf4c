"""Optimizers that clamp: each entry of a gradient before the step, or of a parameter after it."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD

from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number
from rai_toolbox.optim._transforms import Transform, clamping
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer


class _Clamping(ParamTransformingOptimizer):
    """The options of a clamp."""

    def __init__(
        self,
        params: OptimParams | None = None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        clamp_min: float | None = None,
        clamp_max: float | None = None,
        defaults: dict[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"clamp_min": clamp_min, "clamp_max": clamp_max, "param_ndim": param_ndim}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        low, high = optim_group["clamp_min"], optim_group["clamp_max"]
        if low is None and high is None:
            raise ValueError("`clamp_min` and `clamp_max` are both None: give at least one of them")
        for name, bound in (("clamp_min", low), ("clamp_max", high)):
            if bound is not None:
                check_number(name, bound)
        if low is not None and high is not None and low > high:
            raise ValueError(f"`clamp_min` must not exceed `clamp_max`, got {low!r} > {high!r}")

    def _clamp(self, optim_group: OptimGroup) -> Transform:
        return clamping(optim_group["clamp_min"], optim_group["clamp_max"])


@documented
class ClampedGradientOptimizer(_Clamping):
    """Clamp each entry of a gradient before the step.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedGradientOptimizer
    >>> x = torch.zeros(3, requires_grad=True)
    >>> optim = ClampedGradientOptimizer([x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
    >>> (x * torch.tensor([-5.0, 2.0, 5.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([ 1., -2., -3.], requires_grad=True)
    """

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return self._clamp(optim_group)


@documented
class ClampedParameterOptimizer(_Clamping):
    """Clamp each entry of a parameter after the step: the projection on a box.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedParameterOptimizer
    >>> x = torch.ones(3, requires_grad=True)
    >>> optim = ClampedParameterOptimizer([x], lr=1.0, clamp_min=0.0)
    >>> (x * torch.tensor([-5.0, 0.5, 5.0])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([6.0000, 0.5000, 0.0000], requires_grad=True)
    """

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return self._clamp(optim_group)
