"""Optimizers of matrices: gradients orthogonalized, parameters in a spectral ball, on a sphere, or orthonormal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD

from rai_toolbox.functional import project_l2_sphere_, project_spectral_ball_
from rai_toolbox.functional._layout import datum_ndim
from rai_toolbox.functional._norms import TINY
from rai_toolbox.functional._spectral_ball import check_spectral_options, matrix_shape, polar_of_all_
from rai_toolbox.optim._docs import documented
from rai_toolbox.optim._frank_wolfe import _OnBall
from rai_toolbox.optim._options import check_number, required
from rai_toolbox.optim._projected import _InBall
from rai_toolbox.optim._transforms import Number, PerDatum, Transform
from rai_toolbox.optim._wrapper import InnerOptimizer, OptimGroup, OptimParams, ParamTransformingOptimizer

# How long a step is, by the rows and columns of a matrix; the names are those of `torch.optim.Muon(adjust_lr_fn=...)`.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
}


def orthogonalization(steps: int | None, row_blocks: int, scale: float | str = 1.0) -> PerDatum:
    """The polar factor of each matrix, times `scale`: a number, or the name of a function of its shape."""

    def of_all_(xs: Sequence[Tensor], ks: Sequence[int]) -> None:
        polar_of_all_(xs, ks, steps, row_blocks)
        for x, k in zip(xs, ks, strict=True):
            m, n = matrix_shape(x.shape, k, row_blocks)
            factor = _SCALES[scale](m, n) if isinstance(scale, str) and n else scale
            if factor != 1 and x.numel():
                x.mul_(factor)  # pyright: ignore[reportArgumentType]

    return PerDatum(lambda x, k: of_all_([x], [k]), of_all_=of_all_, cost=_multiplications(row_blocks, steps))


def _multiplications(row_blocks: int, steps: int | None) -> Callable[[Sequence[int]], int]:
    """How many multiplications a datum takes, but for a factor: of a step of Newton and Schulz, or of eigenvectors."""

    def cost(shape: Sequence[int]) -> int:
        rows, columns = matrix_shape(shape, len(shape), row_blocks)
        short, long = sorted((rows, columns))
        return row_blocks * short * short * (long + 2 * short if steps is None else 2 * long + short)

    return cost


def spectral_projection(epsilon: Number, row_blocks: int) -> PerDatum:
    """The nearest matrix whose singular values are at most epsilon."""
    return PerDatum(
        lambda x, k: project_spectral_ball_(x, epsilon, param_ndim=k, row_blocks=row_blocks),
        not isinstance(epsilon, Tensor),
        within=lambda rows, _: spectral_projection(rows(epsilon), row_blocks),
        cost=_multiplications(row_blocks, None),
    )


def sphere_projection(epsilon: Number) -> PerDatum:
    """The nearest point of the sphere."""
    return PerDatum(
        lambda x, k: project_l2_sphere_(x, epsilon, param_ndim=k),
        not isinstance(epsilon, Tensor),
        within=lambda rows, _: sphere_projection(rows(epsilon)),
    )


def _check_matrices(optim_group: OptimGroup) -> None:
    """Raise unless `row_blocks` and `steps` (if the group has them) and every parameter's shape make matrices."""
    check_spectral_options(optim_group.get("steps"), optim_group["row_blocks"])
    for p in optim_group["params"]:
        matrix_shape(p.shape, datum_ndim(p.ndim, optim_group["param_ndim"]), optim_group["row_blocks"])


@documented
class OrthogonalizedGradientOptim(ParamTransformingOptimizer):
    """Replace the gradient of each matrix by its orthogonal polar factor: all singular values become 1.

    It is the steepest descent under the spectral norm. After momentum (`AveragedGradientOptim`) it is Muon [1]_.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict, optional
        Parameters or parameter groups: matrices, stacks of matrices, or convolutions with `param_ndim=None`.
    InnerOpt : type, callable or Optimizer, default SGD
        What takes the step. SGD with `weight_decay` decays apart from the gradient, as AdamW does.
    steps : int or None, default 5
        So many steps of Newton and Schulz in bfloat16, as `torch.optim.Muon` takes them; None: the exact factor. Per
        group.
    scale : str or float, default "original"
        Multiplies the factor of a matrix of m rows and n columns: "original", sqrt(max(1, m / n));
        "match_rms_adamw", 0.2 sqrt(max(m, n)); "spectral_unclamped", sqrt(m / n); or a number. The names are those of
        `torch.optim.Muon`. Per group.
    param_ndim : int or None, default 2
        The trailing `param_ndim` dimensions are one matrix, the first of them its rows: 2 for stacks of matrices, None
        for the weight of a convolution. Per group.

    References
    ----------
    .. [1] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import OrthogonalizedGradientOptim
    >>> x = torch.zeros(2, 2, requires_grad=True)
    >>> optim = OrthogonalizedGradientOptim([x], lr=0.5, steps=None)
    >>> (x * torch.tensor([[0.0, 3.0], [-2.0, 0.0]])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 0.0000, -0.5000],
            [ 0.5000,  0.0000]], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        steps: int | None = 5,
        scale: float | str = "original",
        row_blocks: int = 1,
        param_ndim: int | None = 2,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"steps": steps, "scale": scale, "row_blocks": row_blocks}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        _check_matrices(optim_group)
        scale = optim_group["scale"]
        if isinstance(scale, str):
            if scale not in _SCALES:
                raise ValueError(f"`scale` must be a number or one of {', '.join(map(repr, _SCALES))}, got {scale!r}")
        else:
            check_number("scale", scale)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return orthogonalization(optim_group["steps"], optim_group["row_blocks"], optim_group["scale"])


@documented
class SpectralBallOptim(_InBall):
    """Project each matrix on a spectral ball after the step: singular values above epsilon become epsilon.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SpectralBallOptim
    >>> x = torch.zeros(2, 2, requires_grad=True)
    >>> optim = SpectralBallOptim([x], lr=1.0, epsilon=1.0)
    >>> (x * torch.tensor([[-3.0, 0.0], [0.0, 0.5]])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[ 1.0000,  0.0000],
            [ 0.0000, -0.5000]], requires_grad=True)
    """

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        epsilon: float | Tensor,
        row_blocks: int = 1,
        param_ndim: int | None = 2,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        shared = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        own = {"epsilon": epsilon, "row_blocks": row_blocks}
        super().__init__(params, InnerOpt, defaults={**shared, **own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        _check_matrices(optim_group)

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return spectral_projection(optim_group["epsilon"], optim_group["row_blocks"])


@documented
class SphereOptim(_InBall):
    """Project each datum on a sphere after the step: its L2 norm becomes epsilon.

    Parameters
    ----------
    epsilon : float or Tensor, default 1.0
        The radius of the sphere, ≥ 0: a number, or one entry per datum. Per group.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SphereOptim
    >>> x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> optim = SphereOptim([x], lr=1.0)
    >>> (x * torch.tensor([[0.25, -1.0]])).sum().backward()
    >>> optim.step()  # to [0.75, 1], then to the sphere
    >>> x
    tensor([[0.6000, 0.8000]], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        epsilon: float | Tensor = 1.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"epsilon": epsilon, "param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return sphere_projection(optim_group["epsilon"])


@documented
class StiefelOptim(ParamTransformingOptimizer):
    """Replace each matrix by the nearest one with orthonormal rows (or columns, whichever are fewer) after the step.

    The set of such matrices is the Stiefel manifold; the nearest one is the exact polar factor.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict, optional
        Parameters or parameter groups: matrices, stacks of matrices, or convolutions with `param_ndim=None`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import StiefelOptim
    >>> x = torch.eye(2, requires_grad=True)
    >>> optim = StiefelOptim([x], lr=1.0)
    >>> (x * torch.tensor([[-1.0, 0.0], [0.0, 0.5]])).sum().backward()
    >>> optim.step()  # to diag(2, 0.5), then back
    >>> x
    tensor([[1., 0.],
            [0., 1.]], requires_grad=True)
    """

    def __init__(
        self,
        params: OptimParams | None,
        InnerOpt: InnerOptimizer = SGD,
        *,
        row_blocks: int = 1,
        param_ndim: int | None = 2,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: dict[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        own = {"row_blocks": row_blocks, "param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        super().__init__(params, InnerOpt, defaults={**own, **(defaults or {})}, **inner_opt_kwargs)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        _check_matrices(optim_group)

    def _param_transform(self, optim_group: OptimGroup) -> Transform:
        return orthogonalization(None, optim_group["row_blocks"])


@documented
class SpectralFrankWolfe(_OnBall):
    """Minimize over a ball of matrices whose singular values are at most epsilon.

    The oracle is -epsilon times the polar factor of each matrix of the gradient: Scion (Pethick et al., ICML 2025).

    Parameters
    ----------
    steps : int or None, default None
        None: the exact factor, so that iterates stay in the ball. A number: so many steps of Newton and Schulz, whose
        points may lie outside by a fifth. Per group.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SpectralFrankWolfe
    >>> x = torch.zeros(2, 2, requires_grad=True)
    >>> optim = SpectralFrankWolfe([x], epsilon=0.5)
    >>> (x * torch.tensor([[3.0, 0.0], [0.0, -4.0]])).sum().backward()
    >>> optim.step()
    >>> x
    tensor([[-0.5000,  0.0000],
            [ 0.0000,  0.5000]], requires_grad=True)
    """

    @required("epsilon")
    def __init__(
        self,
        params: OptimParams,
        *,
        epsilon: float | Tensor,
        lr: float = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = 2,
        steps: int | None = None,
        row_blocks: int = 1,
    ) -> None:
        options = {"epsilon": epsilon, "steps": steps, "row_blocks": row_blocks}
        self._init(params, options, lr, use_default_lr_schedule, param_ndim, TINY)

    def _check_options(self, optim_group: OptimGroup) -> None:
        super()._check_options(optim_group)
        _check_matrices(optim_group)

    def _grad_transform(self, optim_group: OptimGroup) -> Transform:
        return orthogonalization(optim_group["steps"], optim_group["row_blocks"])
