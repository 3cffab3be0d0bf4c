"""What a solver maximizes, and when a decision counts as changed.

Every loss takes `(output, target)` and returns one number per datum, larger where the model is more wrong. An output
of shape (N,) or (N, 1) is the single logit of a two-class model that says class 1 where it is positive; an output
of shape (N, C) are the logits of C ≥ 2 classes; `target` are class indices, shape (N,).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rai_toolbox.functional._docs import completed

__all__ = [
    "cross_entropy",
    "margin",
    "misclassified",
    "reached",
    "rescaled_cross_entropy",
    "squared_error",
    "targeted_margin",
]

_PARAMETERS = {
    "output": "output : Tensor, shape (N, C), (N, 1) or (N,)",
    "target": "target : Tensor, shape (N,)",
}
# Adds the parameters that a docstring does not describe, and what is returned.
documented = partial(completed, entries=_PARAMETERS, errors={}, shared={"Returns": "Tensor, shape (N,)"})


def as_logits(output: Tensor, target: Tensor) -> Tensor:
    """Return logits of shape (N, C), C ≥ 2, in float32 or wider, for whatever shape a classifier returns.

    Raises ValueError: the shapes are not those of a classifier and class indices.
    """
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    if output.ndim == 2 and output.shape[1] == 1:
        output = output[:, 0]
    if target.ndim == 1 and output.shape[:1] == target.shape:
        if output.ndim == 1:
            # Only differences of logits matter: one logit z is the pair (0, z).
            return torch.stack((torch.zeros_like(output), output), dim=1)
        if output.ndim == 2:
            return output
    raise ValueError(
        "a classifier must return logits of shape (N, C), or (N,) or (N, 1) for two classes, for class indices of "
        f"shape (N,); got an output of shape {tuple(output.shape)} and a target of shape {tuple(target.shape)}. For "
        "anything else give a criterion and a margin of your own"
    )


def _others(logits: Tensor, target: Tensor) -> Tensor:
    return logits.scatter(1, target[:, None], -torch.inf)


@documented
def margin(output: Tensor, target: Tensor) -> Tensor:
    """By how much the best other logit exceeds the target's: positive where the decision is wrong.

    Equivariant under a scaling of the logits, so a solver that looks at the gradient's direction and at the order of
    losses does the same at any scale.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import margin
    >>> margin(torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]), torch.tensor([0, 1]))
    tensor([-1.,  2.])
    """
    logits = as_logits(output, target)
    return _others(logits, target).amax(dim=1) - logits.gather(1, target[:, None])[:, 0]


@documented
def targeted_margin(output: Tensor, target: Tensor) -> Tensor:
    """By how much the target's logit exceeds the best other: positive where the target is reached.

    Parameters
    ----------
    target : Tensor, shape (N,)
        The classes to reach.
    """
    return -margin(output, target)


@documented
def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy as it is trained on. Vanishes where the logits are large: see `rescaled_cross_entropy`."""
    return F.cross_entropy(as_logits(output, target), target, reduction="none")


@documented
def rescaled_cross_entropy(output: Tensor, target: Tensor, spread: float = 8.0) -> Tensor:
    """Cross-entropy of the logits stretched to a fixed spread per datum, so that it never saturates.

    The factor counts as a constant in the gradient. Multiplying the logits by any positive number changes nothing.

    Parameters
    ----------
    spread : float
        From the least to the greatest logit.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import rescaled_cross_entropy
    >>> logits, target = torch.tensor([[3.0, 1.0, -1.0]]), torch.tensor([0])
    >>> rescaled_cross_entropy(logits, target) == rescaled_cross_entropy(1024 * logits, target)
    tensor([True])
    """
    logits = as_logits(output, target)
    with torch.no_grad():
        low, high = logits.aminmax(dim=1, keepdim=True)
        width = (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    return F.cross_entropy((logits - high) / width * spread, target, reduction="none")


@documented
def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error summed over everything but the batch: the loss of a regression.

    Parameters
    ----------
    output : Tensor, shape (N, ...)
    target : Tensor, shape (N, ...)
        As many entries as `output`.
    """
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    if output.shape[:1] != target.shape[:1] or output.numel() != target.numel():
        classes = "; for class numbers give integers, target.long()" if target.ndim == 1 < output.ndim else ""
        raise ValueError(
            f"the output, of shape {tuple(output.shape)}, and the target, of shape {tuple(target.shape)}, must have "
            f"as many entries{classes}"
        )
    return (output - target.reshape(output.shape)).square().reshape(len(output), -1).sum(dim=1)


@documented
def misclassified(output: Tensor, target: Tensor) -> Tensor:
    """Whether the predicted class, the argmax (for a single logit, its sign), is not the target.

    Where a logit is NaN there is no prediction, and nothing is claimed: False.

    Returns
    -------
    Tensor of bool, shape (N,)
    """
    logits = as_logits(output, target)
    return (logits.argmax(dim=1) != target) & ~logits.isnan().any(dim=1)


@documented
def reached(output: Tensor, target: Tensor) -> Tensor:
    """Whether the predicted class is the target. False where a logit is NaN.

    Returns
    -------
    Tensor of bool, shape (N,)
    """
    logits = as_logits(output, target)
    return (logits.argmax(dim=1) == target) & ~logits.isnan().any(dim=1)
