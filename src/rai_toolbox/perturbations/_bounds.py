"""The argument `bounds`, checked: numbers or tensors that the data lie within."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Bounds: TypeAlias = "tuple[float | Tensor, float | Tensor] | None"


def check_bounds(bounds: Any, data: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return `(lower, upper)` as tensors of the data's dtype and device that broadcast to it, or None.

    Raises TypeError: `bounds` is not None or a pair.
    Raises ValueError: a bound is NaN or does not broadcast to the data, lower > upper somewhere, or the data lie
        outside.
    """
    if bounds is None:
        return None
    try:
        lower, upper = bounds
    except (TypeError, ValueError):
        raise TypeError(
            f"bounds must be None or a pair (lower, upper) of numbers or tensors; got {type(bounds).__name__}"
        ) from None
    pair = []
    for name, value in (("lower", lower), ("upper", upper)):
        bound = torch.as_tensor(value, dtype=data.dtype, device=data.device).detach()
        try:
            bound.expand(data.shape)
        except RuntimeError:
            raise ValueError(
                f"the {name} bound has shape {tuple(bound.shape)}, which does not broadcast to "
                f"the data's {tuple(data.shape)}"
            ) from None
        pair.append(bound)
    low, high = pair
    if not bool((low <= high).all()):
        raise ValueError("bounds: lower must be ≤ upper everywhere (and neither may be NaN)")
    if data.numel():
        outside = (data < low) | (data > high) | data.isnan()
        if bool(outside.any()):
            raise ValueError(
                f"{int(outside.sum())} of {data.numel()} entries of the data lie outside the bounds or are NaN (they "
                f"range from {data.min().item():g} to {data.max().item():g}): nothing within the bounds is near them. "
                "Give bounds in the units of the data, or None"
            )
    return low, high
