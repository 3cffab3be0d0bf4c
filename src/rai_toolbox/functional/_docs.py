"""The docstrings of functions: what many share is written once, here, and a function and its in-place twin share all.

A docstring says what is its own. `documented` adds the parameters of the signature that it does not describe, and the
errors that they can raise; `twin_of` also what the twin has in common with its function.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

F = TypeVar("F", bound=Callable[..., object])
Entry: TypeAlias = tuple[str, str]  # the type of a parameter, and what it is

_TENSOR = "Tensor, shape (*batch, *datum)", "Real floating point."
_RADIUS = "The radius, ≥ 0: a number, or one entry per datum (of the batch's shape, broadcastable to it, or flat)."
_PARAMETERS: dict[str, Entry] = {
    "x": _TENSOR,
    "g": _TENSOR,
    "p": ("float", "The order of the norm, p ≥ 1; `math.inf` for the largest magnitude."),
    "epsilon": ("float or Tensor", _RADIUS),
    "q": (
        "float",
        "In [0, 1]: of the D entries of a datum exactly k = `round((1 - q) * D)` are kept, those of lowest index among "
        "equal magnitudes. NaN counts as infinite.",
    ),
    "param_ndim": (
        "int or None",
        "The trailing `param_ndim` dimensions are one datum; see `rai_toolbox.to_batch`.",
    ),
    "lower": ("float, Tensor or None", "The lower bounds of the box; a tensor is broadcast to `x`."),
    "upper": ("float, Tensor or None", "The upper bounds, likewise."),
    "steps": (
        "int, optional",
        "None: exact. A number: so many steps of Newton and Schulz in bfloat16, which leave the singular values of "
        "most matrices in [0.5, 1.3].",
    ),
    "row_blocks": (
        "int",
        "Cut each datum into so many matrices of d0 / row_blocks rows, as for the weight of a fused attention "
        "projection.",
    ),
    "negated": ("bool", "Give -s instead of s."),
    "generator": (
        "torch.Generator",
        "May be on another device than `x`: the points are drawn where the generator is.",
    ),
}
# What makes it a TypeError or a ValueError.
_ERRORS = {
    "x": "`x` is not of such a dtype",
    "g": "`g` is not of such a dtype",
    "p": "`p` is not a number, or less than 1",
    "epsilon": "`epsilon` is not a number, is negative, or does not fit the data",
    "total": "`total` is not a number, is negative, or does not fit the data",
    "q": "`q` is not a number in [0, 1]",
    "param_ndim": "`param_ndim` does not fit the tensor",
    "lower": "a bound has the wrong type, or does not fit `x`; `lower` exceeds `upper`",
    "steps": "`steps` is neither None nor an int ≥ 1",
    "row_blocks": "`row_blocks` is not an int ≥ 1, or does not divide d0",
}


def documented(function: F) -> F:
    """Complete the docstring of a function.

    Examples
    --------
    >>> @documented
    ... def kept_share(q, *, negated=False):
    ...     '''Return the share that is kept.'''
    >>> print(kept_share.__doc__)
    Return the share that is kept.
    <BLANKLINE>
    Parameters
    ----------
    q : float
        In [0, 1]: of the D entries of a datum exactly k = `round((1 - q) * D)` are kept, those of lowest index among
        equal magnitudes. NaN counts as infinite.
    negated : bool
        Give -s instead of s.
    <BLANKLINE>
    Raises
    ------
    TypeError, ValueError
        `q` is not a number in [0, 1].
    """
    return completed(function, _COMMON, _ERRORS)


def twin_of(function: Callable[..., object]) -> Callable[[F], F]:
    """Complete the docstring of the in-place twin of a function: its first parameter is changed and returned."""
    shared = sections(function)[1]

    def complete(twin: F) -> F:
        first = next(iter(inspect.signature(twin).parameters))
        changed = {first: entry(first, ("Tensor", "Changed in place; any strides."))}
        entries = {**_COMMON, **_entries(shared.get("Parameters", "")), **changed}
        return completed(twin, entries, _ERRORS, shared | {"Returns": f"Tensor\n    `{first}`."})

    return complete


def completed(described: F, entries: Mapping[str, str], errors: Mapping[str, str], shared: Mapping[str, str] = {}) -> F:
    """Add to the docstring of a function or a class what it does not say itself.

    entries: by the name of a parameter, what is said of it; several may share an entry.
    errors: by the name of a parameter, what makes it a TypeError or a ValueError.
    shared: other sections, by their heading.
    """
    if described.__doc__ is None:  # python -OO
        return described
    summary, own = sections(described)
    names = inspect.signature(described).parameters
    entries = {**entries, **_entries(own.pop("Parameters", ""))}
    made = {"Parameters": "\n".join(dict.fromkeys(entries[name] for name in names))}
    for heading in ("Attributes", "Returns"):
        made[heading] = own.pop(heading, shared.get(heading, ""))
    wrong = "; ".join(errors[name] for name in names if name in errors)
    general = f"TypeError, ValueError\n{_filled(wrong)}." if wrong else ""
    special = own.pop("Raises", shared.get("Raises", "").removeprefix(general).strip("\n"))
    made["Raises"] = "\n".join(filter(None, [general, special]))
    made["References"] = own.pop("References", shared.get("References", ""))
    parts = [f"{heading}\n{'-' * len(heading)}\n{text}" for heading, text in (made | own).items() if text]
    described.__doc__ = "\n\n".join([summary, *parts])
    return described


def sections(described: object) -> tuple[str, dict[str, str]]:
    """Return what stands before the first heading of a docstring, and the text under each heading."""
    summary, *parts = re.split(r"^(\w+)\n-+\n", inspect.cleandoc(described.__doc__ or ""), flags=re.MULTILINE)
    return summary.rstrip(), {name: text.rstrip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def entry(name: str, said: Entry) -> str:
    """Return the text about a parameter."""
    return f"{name} : {said[0]}\n{_filled(said[1])}" if said[0] else f"{name}\n{_filled(said[1])}"


def _entries(parameters: str) -> dict[str, str]:
    texts = re.split(r"\n(?=\S)", parameters)
    return {name.lstrip("*"): text for text in texts for name in re.split(" : |\n", text)[0].split(", ")}


def _filled(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, 115), "    ")


_COMMON = {name: entry(name, said) for name, said in _PARAMETERS.items()}
