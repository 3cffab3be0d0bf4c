"""Optimizers that step along few entries of a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator
from torch.optim import SGD

from rai_toolbox.functional._norms import TINY
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number, required
from rai_toolbox.optim._random import Draws
from rai_toolbox.optim._transforms import Transform, selection, signed_selection
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer


@documented
class TopQGradientOptimizer(ParamTransformingOptimizer):
    """Keep the entries of largest magnitude of each gradient and zero the rest, before the step.

    Exactly `round((1 - q) * D)` of the D entries of a datum stay, also where magnitudes are equal (the first ones do).

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import TopQGradientOptimizer
    >>> x = torch.zeros(1, 4, requires_grad=True)
    >>> optim = TopQGradientOptimizer([x], lr=1.0, q=0.5)
    >>> (x * torch.tensor([1.0, -3.0, 2.0, 0.5])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 0.,  3., -2.,  0.]], requires_grad=True)
    """

    @required("q")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        q: float,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        defaults: dict[str, Any] | None = None,
        generator: Generator = torch.default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        self._draws = Draws(generator)
        own = {"q": q, "dq": dq, "param_ndim": param_ndim}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_selection(optim_group)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return selection(*self._draws.share(optim_group))


@documented
class L1qNormedGradientOptim(TopQGradientOptimizer):
    """Step along the signs of the entries of largest magnitude of each gradient.

    Top-q, then the sign, then division by the L1 norm: ±1/k on k entries, times `grad_scale`. This is the steepest
    descent under the L1 norm, made less sparse [1]_.

    References
    ----------
    .. [1] F. Tramèr and D. Boneh, "Adversarial training and robustness for multiple perturbations", NeurIPS 2019.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1qNormedGradientOptim
    >>> x = torch.zeros(1, 4, requires_grad=True)
    >>> optim = L1qNormedGradientOptim([x], lr=1.0, q=0.5)
    >>> (x * torch.tensor([1.0, -3.0, 2.0, 0.5])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 0.0000,  0.5000, -0.5000,  0.0000]], requires_grad=True)
    """

    @required("q")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        q: float,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        generator: Generator = torch.default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"grad_scale": grad_scale, "grad_bias": grad_bias, "div_by_zero_eps": div_by_zero_eps}
        super().__init__(
            params,
            InnerOpt,
            q=q,
            dq=dq,
            param_ndim=param_ndim,
            defaults={**own, **(defaults or {})},
            generator=generator,
            **inner_opt_kwargs,
        )

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_number("div_by_zero_eps", optim_group["div_by_zero_eps"], low=0.0)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return signed_selection(*self._draws.share(optim_group), eps=optim_group["div_by_zero_eps"])


def check_selection(optim_group: OptimGroup) -> None:
    """Raise unless `q` and `dq` of a group are shares."""
    check_number("q", optim_group["q"], low=0.0, high=1.0)
    check_number("dq", optim_group["dq"], low=0.0, high=1.0)
