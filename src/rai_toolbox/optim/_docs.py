"""What is said about the options that many optimizers share, written once.

`{options}` in the docstring of an optimizer stands for the paragraphs that belong to the parameters of its
`__init__`, in that order, except those that the docstring describes itself.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import TypeVar

Class = TypeVar("Class", bound=type)

_PARAGRAPHS = {
    "params": """
        params : iterable of Tensor, of (str, Tensor), or of dict
            Parameters or parameter groups, as any `torch.optim.Optimizer` takes them. None only with an `InnerOpt`
            instance. Real floating point; strided, sparse COO where the mathematics allows, or DTensor.""",
    "InnerOpt": """
        InnerOpt : type, callable or Optimizer, default SGD
            What takes the step: an optimizer class, a `functools.partial` of one, any callable that returns an
            optimizer, or an optimizer, whose parameter groups are then used.""",
    "epsilon": """
        epsilon : float or Tensor
            The radius of the ball, ≥ 0, in the units of the parameter: a number, or one entry per datum. Per group.""",
    "lower": """
        lower, upper : float or Tensor, optional
            The box, in the units of the parameter: numbers, or tensors that broadcast to each parameter. Per group.""",
    "upper": "",
    "q": """
        q : float
            The share of entries that become zero, in [0, 1]: `round((1 - q) * D)` of the D entries of a datum stay.
            Per group.""",
    "dq": """
        dq : float, default 0.0
            If positive, q is drawn for each parameter and step, uniformly from [max(0, q - dq), min(1, q + dq)]. Ranks
            of a process group draw the same number. Per group.""",
    "lr": """
        lr : float, default 2.0
            With the default schedule the update k (from 0) has the step size lr / (lr + k); otherwise the step size,
            in [0, 1]. Per group.""",
    "use_default_lr_schedule": """
        use_default_lr_schedule : bool, default True
            Whether `lr` sets a schedule or a step size; see `lr`. Per group.""",
    "param_ndim": """
        param_ndim : int or None
            How many trailing dimensions of a parameter are one datum: the transform acts on each datum by itself. A
            negative number counts from the parameter's own (-1: the first dimension is batch); None: the whole tensor
            is one datum; 0: each entry is. Per group; see `rai_toolbox.to_batch`.""",
    "grad_scale": """
        grad_scale : float, default 1.0
            Multiplies each gradient, in place, after it was transformed. Per group.""",
    "grad_bias": """
        grad_bias : float, default 0.0
            Is added to each gradient, in place, after `grad_scale`. Per group.""",
    "defaults": """
        defaults : dict, optional
            Defaults of any option of the parameter groups; an entry wins over the keyword of the same name. Not
            changed.""",
    "div_by_zero_eps": """
        div_by_zero_eps : float, default 1.1754943508222875e-38
            A lower bound of the norm that a gradient is divided by. A zero gradient stays zero. Per group.""",
    "generator": """
        generator : torch.Generator, default torch.default_generator
            Where random numbers are drawn from; on any device. Not part of `state_dict`.""",
    "inner_opt_kwargs": """
        **inner_opt_kwargs
            Keywords for `InnerOpt`.""",
    "kwargs": """
        **kwargs
            Keywords for `InnerOpt`.""",
}


def documented(cls: Class) -> Class:
    """Fill in `{options}` in the docstring of an optimizer class."""
    if cls.__doc__ is None:  # python -OO
        return cls
    doc = cls.__doc__
    described = set(re.findall(r"^    \**([\w, ]+)(?: :|$)", doc, flags=re.MULTILINE))
    described = {name.strip() for names in described for name in names.split(",")}
    names = [name for name in inspect.signature(cls).parameters if name not in described]
    paragraphs = (textwrap.dedent(_PARAGRAPHS.get(name, "")).strip() for name in names)
    options = textwrap.indent("\n".join(p for p in paragraphs if p), "    ").lstrip()
    cls.__doc__ = doc.replace("{options}", options)
    return cls
