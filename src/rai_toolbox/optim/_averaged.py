"""Momentum: an optimizer that replaces each gradient by a running average of the gradients."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD

from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._options import check_number
from rai_toolbox.optim._running import averaging
from rai_toolbox.optim._transforms import Transform
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer


@documented
class AveragedGradientOptim(ParamTransformingOptimizer):
    """Replace each gradient by a running average: momentum before whatever comes after it.

    With the mean m of a parameter, zero at first, a step does

        m ← decay · m + weight · g,    g ← mix · m + (1 - mix) · g.

    In a chain, links before it change what is averaged, links after it change the average:

    ============================ ======== ============= ===========
    method                       decay    mix           weight
    ============================ ======== ============= ===========
    momentum; Signum, then sign  0.9      1             0.1
    Nesterov's, as in Muon       0.95     0.95          0.05
    Lion, then sign              β₂       β₁ / β₂       1 - β₂
    MI-FGSM, L1-normed before    1        1             1
    ============================ ======== ============= ===========

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict, optional
        Parameters or parameter groups. Gradients are dense.
    InnerOpt : type, callable or Optimizer, default SGD
        What takes the step. It must evaluate a closure once a step: LBFGS does not.
    decay : float, default 0.9
        In [0, 1]. Per group.
    mix : float, default 1.0
        How much of the result is the mean; the rest is the gradient of this step. Per group.
    weight : float, optional
        Of a gradient in the mean; None: 1 - decay. Per group.

    Raises
    ------
    TypeError, ValueError
        As `ParamTransformingOptimizer`; `decay` lies outside [0, 1].
    RuntimeError
        The inner optimizer evaluates the closure a second time in a step.

    Notes
    -----
    The mean is float32 at least, and lies in `state[p]` under the key `AveragedGradientOptim.mean` from the first step
    on. Checkpoints, copies and sharded parameters keep it.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import AveragedGradientOptim
    >>> x = torch.zeros(1, requires_grad=True)
    >>> optim = AveragedGradientOptim([x], lr=1.0, decay=0.5)
    >>> for g in (1.0, 1.0):
    ...     x.grad = torch.tensor([g])
    ...     optim.step()  # along 0.5, then 0.75
    >>> x
    tensor([-1.2500], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        decay: float = 0.9,
        mix: float = 1.0,
        weight: float | None = None,
        param_ndim: int | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"decay": decay, "mix": mix, "weight": weight}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        check_number("decay", optim_group["decay"], low=0.0, high=1.0)
        check_number("mix", optim_group["mix"])
        if optim_group["weight"] is not None:
            check_number("weight", optim_group["weight"])

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return averaging(optim_group["decay"], optim_group["mix"], optim_group["weight"])
