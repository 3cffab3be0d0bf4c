"""What the docstrings of optimizers share, written once; see `functional/_docs.py`."""

from __future__ import annotations

import inspect
from typing import TypeVar

from rai_toolbox.functional._docs import Entry, completed, entry, sections

Class = TypeVar("Class", bound=type)

_PARAMETERS: dict[str, Entry] = {
    "params": (
        "iterable of Tensor, of (str, Tensor), or of dict",
        "Parameters or parameter groups, as any `torch.optim.Optimizer` takes them. None only with an `InnerOpt` "
        "instance. Real floating point; strided, sparse COO where the mathematics allows, or DTensor.",
    ),
    "InnerOpt": (
        "type, callable or Optimizer, default SGD",
        "What takes the step: an optimizer class, a `functools.partial` of one, any callable that returns an "
        "optimizer, or an optimizer, whose parameter groups are then used.",
    ),
    "epsilon": (
        "float or Tensor",
        "The radius of the ball, ≥ 0, in the units of the parameter: a number, or one entry per datum. Per group.",
    ),
    "lower": (
        "float or Tensor, optional",
        "The lower bounds of the box, in the units of the parameter: a number, or a tensor that broadcasts to each"
        " parameter. Per group.",
    ),
    "upper": ("float or Tensor, optional", "The upper bounds, likewise. Per group."),
    "q": (
        "float",
        "The share of entries that become zero, in [0, 1]: `round((1 - q) * D)` of the D entries of a datum stay. "
        "Per group.",
    ),
    "dq": (
        "float, default 0.0",
        "If positive, q is drawn for each parameter and step, uniformly from [max(0, q - dq), min(1, q + dq)]. "
        "Ranks of a process group draw the same number. Per group.",
    ),
    "lr": (
        "float, default 2.0",
        "With the default schedule the update k (from 0) has the step size lr / (lr + k); otherwise the step size,"
        " in [0, 1]. Per group.",
    ),
    "use_default_lr_schedule": (
        "bool, default True",
        "Whether `lr` sets a schedule or a step size; see `lr`. Per group.",
    ),
    "param_ndim": (
        "int or None",
        "How many trailing dimensions of a parameter are one datum: the transform acts on each datum by itself. A "
        "negative number counts from the parameter's own (-1: the first dimension is batch); None: the whole "
        "tensor is one datum; 0: each entry is. Per group; see `rai_toolbox.to_batch`.",
    ),
    "grad_scale": ("float, default 1.0", "Multiplies each gradient, in place, after it was transformed. Per group."),
    "grad_bias": ("float, default 0.0", "Is added to each gradient, in place, after `grad_scale`. Per group."),
    "defaults": (
        "dict, optional",
        "Defaults of any option of the parameter groups; an entry wins over the keyword of the same name. Not changed.",
    ),
    "div_by_zero_eps": (
        "float, default 1.1754943508222875e-38",
        "A lower bound of the norm that a gradient is divided by. A zero gradient stays zero. Per group.",
    ),
    "generator": (
        "torch.Generator, default torch.default_generator",
        "Where random numbers are drawn from; on any device. Not part of `state_dict`.",
    ),
    "inner_opt_kwargs": ("", "Keywords for `InnerOpt`."),
    "kwargs": ("", "Keywords for `InnerOpt`."),
    "row_blocks": (
        "int, default 1",
        "Cut each matrix into so many matrices of m / row_blocks rows, as for a fused attention projection. Per group.",
    ),
    "clamp_min": ("float, optional", "The lower bound; it or `clamp_max` must be given. Per group."),
    "clamp_max": ("float, optional", "The upper bound, likewise. Per group."),
}
_ERRORS = {
    "epsilon": "`epsilon` is missing, is negative, or fits no parameter",
    "total": "`total` is negative or fits no parameter",
    "p": "`p` or `_p` is missing, not a number, or less than 1",
    "q": "`q` is missing, or lies outside [0, 1]",
    "dq": "`dq` lies outside [0, 1]",
    "lower": "at a step, ball and box have no point in common",
    "clamp_min": "both bounds are None, or `clamp_min > clamp_max`",
    "scale": "`scale` is no number and none of the names",
    "row_blocks": "`row_blocks` does not divide the rows of a parameter",
}


def documented(cls: Class) -> Class:
    """Add to the docstring of an optimizer the parameters that it does not describe, and errors if it names none."""
    stars = {"inner_opt_kwargs": "**", "kwargs": "**"}
    entries = {name: entry(stars.get(name, "") + name, said) for name, said in _PARAMETERS.items()}
    if "Raises" in sections(cls)[1]:
        return completed(cls, entries, {})
    base = "ParamTransformingOptimizer" if "InnerOpt" in inspect.signature(cls).parameters else "FrankWolfe"
    return completed(cls, entries, {"params": f"As `{base}`", **_ERRORS})
