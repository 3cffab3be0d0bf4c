"""Models of a perturbation: what is optimized, and how it acts on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "AdditivePerturbation",
    "MultiplicativePerturbation",
    "PerturbationModel",
    "ShiftPerturbation",
]


@runtime_checkable
class PerturbationModel(Protocol):
    """Anything with `parameters()` that is callable on data: the solvers optimize the first to change the second.

    A model that can keep its output inside bounds also has a method `constraint(data, lower, upper)`, which returns a
    function of no arguments that moves the parameters there, in place; a solver calls it after every step. (A clamp
    in the forward pass would cut the gradient off exactly where the worst case lies.)

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import PerturbationModel
    >>> isinstance(torch.nn.Linear(2, 2), PerturbationModel)
    True
    """

    def parameters(self) -> Iterable[Tensor]: ...

    def __call__(self, data: Any, /) -> Tensor: ...


def _parameter_like(
    data_or_shape: Tensor | Sequence[int],
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    delta_ndim: int | None,
) -> nn.Parameter:
    if isinstance(data_or_shape, Tensor):
        shape = tuple(data_or_shape.shape)
        device = data_or_shape.device if device is None else device
        dtype = data_or_shape.dtype if dtype is None else dtype
    else:
        shape = tuple(int(size) for size in data_or_shape)
    if delta_ndim is not None:
        if isinstance(delta_ndim, bool) or not isinstance(delta_ndim, int):
            raise TypeError(f"delta_ndim must be an int or None; got {delta_ndim!r}")
        if abs(delta_ndim) > len(shape):
            raise ValueError(
                f"delta_ndim must lie in [{-len(shape)}, {len(shape)}] for data of shape {shape}; got {delta_ndim}"
            )
        shape = shape[len(shape) - delta_ndim :] if delta_ndim >= 0 else shape[-delta_ndim:]
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"a perturbation needs a floating point dtype, for it is differentiated; got {dtype}")
    return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))


class AdditivePerturbation(nn.Module):
    """`data + delta`, with the one parameter `delta`.

    Parameters
    ----------
    data_or_shape : Tensor or Sequence[int]
        Gives the shape of `delta` and, if a tensor, its device and dtype.
    init_fn : Callable[..., Any], optional
        Fills `delta` in place: `init_fn(delta, **init_fn_kwargs)`. Without it, `delta` is zero.
    device, dtype : optional
        Override those of the data.
    delta_ndim : int, optional
        How many trailing dimensions of the shape are kept (if ≥ 0), or how many leading ones are dropped
        (if negative). So -1 is one "universal" perturbation of a whole batch.
    **init_fn_kwargs : Any
        Passed to `init_fn`.

    Raises
    ------
    TypeError
        `init_fn_kwargs` without `init_fn`, or a dtype that cannot be differentiated.
    ValueError
        `delta_ndim` is out of the data's range.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import AdditivePerturbation
    >>> data = torch.zeros(3, 2)
    >>> AdditivePerturbation(data, torch.nn.init.constant_, val=0.5)(data)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000],
            [0.5000, 0.5000]], grad_fn=<AddBackward0>)
    >>> AdditivePerturbation(data, delta_ndim=-1).delta.shape
    torch.Size([2])
    """

    delta: nn.Parameter

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        init_fn: Callable[..., Any] | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        delta_ndim: int | None = None,
        **init_fn_kwargs: Any,
    ) -> None:
        super().__init__()
        if init_fn is None and init_fn_kwargs:
            raise TypeError(f"{sorted(init_fn_kwargs)} were given for init_fn, but init_fn is None")
        self.delta = _parameter_like(data_or_shape, device, dtype, delta_ndim)
        self._init_fn = init_fn
        self._init_fn_kwargs = init_fn_kwargs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill `delta` as at construction, with new random numbers where `init_fn` draws them."""
        with torch.no_grad():
            if self._init_fn is None:
                self.delta.zero_()
            else:
                self._init_fn(self.delta, **self._init_fn_kwargs)

    def forward(self, data: Tensor) -> Tensor:
        return data + self.delta

    def constraint(self, data: Tensor, lower: Tensor, upper: Tensor) -> Callable[[], object]:
        """Return a function that clamps `delta` so that `data + delta` lies in [lower, upper]."""
        # One delta shared by several data has to suit all of them.
        low = _reduce_to(lower - data, self.delta.shape, torch.amax)
        high = _reduce_to(upper - data, self.delta.shape, torch.amin)
        delta = self.delta.detach()
        return lambda: delta.clamp_(low, high)


class MultiplicativePerturbation(nn.Module):
    """`data * exp(log_factor)`: a gain per entry, or per whatever `delta_ndim` shares.

    In decibels or in percent, a bound on `log_factor` is a bound on the relative change of every entry, so a
    zero stays zero and a sign stays a sign.

    Parameters
    ----------
    data_or_shape, device, dtype, delta_ndim
        As for `AdditivePerturbation`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import MultiplicativePerturbation
    >>> data = torch.tensor([[1.0, 2.0]])
    >>> MultiplicativePerturbation(data)(data)
    tensor([[1., 2.]], grad_fn=<MulBackward0>)
    """

    log_factor: nn.Parameter

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        delta_ndim: int | None = None,
    ) -> None:
        super().__init__()
        self.log_factor = _parameter_like(data_or_shape, device, dtype, delta_ndim)

    def reset_parameters(self) -> None:
        """Back to a gain of one."""
        with torch.no_grad():
            self.log_factor.zero_()

    def forward(self, data: Tensor) -> Tensor:
        return data * self.log_factor.exp()


class ShiftPerturbation(nn.Module):
    """Translate each image by a (fractional) number of pixels, with bilinear interpolation.

    Parameters
    ----------
    data_or_shape : Tensor or Sequence[int], shape (N, C, H, W)
    device, dtype : optional
        Override those of the data.

    Attributes
    ----------
    shift : Parameter, shape (N, 2)
        Down and right, in pixels. What moves in from outside repeats the border.

    Raises
    ------
    ValueError
        The data are not (N, C, H, W).

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import ShiftPerturbation
    >>> image = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]])
    >>> model = ShiftPerturbation(image)
    >>> with torch.no_grad():
    ...     _ = model.shift.copy_(torch.tensor([[0.0, 0.5]]))
    ...     model(image)
    tensor([[[[0.0000, 0.5000, 0.5000],
              [0.0000, 0.5000, 0.5000]]]])
    """

    shift: nn.Parameter

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = tuple(data_or_shape.shape if isinstance(data_or_shape, Tensor) else data_or_shape)
        if len(shape) != 4:
            raise ValueError(f"ShiftPerturbation moves images of shape (N, C, H, W); got data of shape {shape}")
        if isinstance(data_or_shape, Tensor):
            device = data_or_shape.device if device is None else device
            dtype = data_or_shape.dtype if dtype is None else dtype
        self.shift = _parameter_like((shape[0], 2), device, dtype, None)

    def reset_parameters(self) -> None:
        """Back to no shift."""
        with torch.no_grad():
            self.shift.zero_()

    def forward(self, data: Tensor) -> Tensor:
        height, width = data.shape[-2:]
        row = torch.arange(height, device=data.device, dtype=data.dtype) - self.shift[:, :1]
        column = torch.arange(width, device=data.device, dtype=data.dtype) - self.shift[:, 1:]
        # grid_sample counts from -1 to 1 between the centers of the first and last pixel.
        y = row * (2 / max(height - 1, 1)) - 1
        x = column * (2 / max(width - 1, 1)) - 1
        grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
        return nn.functional.grid_sample(data, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _reduce_to(x: Tensor, shape: Sequence[int], reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce the dimensions of `x` over which a tensor of shape `shape` would broadcast."""
    dims = tuple(range(x.ndim - len(shape)))
    x = reduce(x, dim=dims) if dims else x
    shared = tuple(d for d, size in enumerate(shape) if size == 1 and x.shape[d] != 1)
    return reduce(x, dim=shared, keepdim=True) if shared else x
