"""The negative of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import Tensor

P = ParamSpec("P")


def negate(func: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Return the function whose result is minus that of `func`: an optimizer that minimizes it maximizes `func`.

    Parameters
    ----------
    func : Callable[..., Tensor]

    Returns
    -------
    Callable[..., Tensor]
        Takes what `func` takes.

    Raises
    ------
    TypeError
        `func` cannot be called.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import negate
    >>> negate(torch.sum)(torch.tensor([1.0, 2.0]))
    tensor(-3.)
    """
    if not callable(func):
        raise TypeError(f"func must be callable; got {type(func).__name__}")

    def negative(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return -func(*args, **kwargs)

    try:
        return wraps(func)(negative)
    except (AttributeError, TypeError):  # e.g. a callable whose __dict__ cannot be merged
        return negative
