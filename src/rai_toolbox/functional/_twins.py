"""One text for a function and its in-place twin."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import cleandoc
from typing import TypeVar

__all__ = ["twin_of"]

F = TypeVar("F", bound=Callable[..., object])


def twin_of(function: Callable[..., object]) -> Callable[[F], F]:
    """Complete the docstring of an in-place twin from that of its function.

    The twin's own docstring has a summary, the parameters that it alone has, and examples. It gets the other
    parameters, the errors and the references of the function; its first parameter is changed in place and returned.

    Examples
    --------
    >>> def doubled(x, times=1):
    ...     '''Double.
    ...
    ...     Parameters
    ...     ----------
    ...     x : Tensor
    ...         Any dtype.
    ...     times : int
    ...         How often.
    ...     '''
    >>> @twin_of(doubled)
    ... def doubled_(x, times=1):
    ...     '''Double in place.'''
    >>> print(doubled_.__doc__)
    Double in place.
    <BLANKLINE>
    Parameters
    ----------
    x : Tensor
        Changed in place; any strides.
    times : int
        How often.
    <BLANKLINE>
    Returns
    -------
    Tensor
        `x`.
    """
    _, shared = _sections(function)
    head, _, rest = shared.get("Parameters", "").partition("\n")
    first, _, others = head.partition(" : ")[0].partition(", ")
    # The first parameter may share its entry with others; an entry of its own is dropped.
    rest = f"{others}\n{rest}" if others else re.sub(r"\A(?: [^\n]*\n?)*", "", rest)

    def complete(twin: F) -> F:
        if function.__doc__ is None:  # python -OO
            return twin
        summary, own = _sections(twin)
        parameters = [f"{first} : Tensor\n    Changed in place; any strides.", rest, own.pop("Parameters", "")]
        sections = {"Parameters": "\n".join(filter(None, parameters)), "Returns": f"Tensor\n    `{first}`."}
        sections |= {name: shared[name] for name in ("Raises", "References") if name in shared}
        parts = [f"{name}\n{'-' * len(name)}\n{text}" for name, text in (sections | own).items()]
        twin.__doc__ = "\n\n".join([summary, *parts])
        return twin

    return complete


def _sections(function: Callable[..., object]) -> tuple[str, dict[str, str]]:
    """Return what stands before the first heading of a docstring, and the text under each heading."""
    summary, *parts = re.split(r"^(\w+)\n-+\n", cleandoc(function.__doc__ or ""), flags=re.MULTILINE)
    return summary.rstrip(), {name: text.rstrip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
