"""Models of MAITE's protocol that hold a torch module: the solvers need its gradient, which the protocol has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._imports import guarded
from rai_toolbox.robustness.data._maite import is_of_maite

_USUAL = ("model", "module", "net", "network")


def held_module(model: Any) -> Any:
    """Return the torch module that a MAITE model holds in an attribute; anything else is returned as it is.

    Raises InputError if it holds none, or several of which none has a usual name.
    """
    if isinstance(model, nn.Module) or not is_of_maite(model):
        return model
    held = {name: value for name, value in vars(model).items() if isinstance(value, nn.Module)}
    usual = [name for name in (f"{prefix}{name}" for name in _USUAL for prefix in ("", "_")) if name in held]
    if len(held) == 1 or usual:
        return held[usual[0]] if usual else next(iter(held.values()))
    found = f"holds several, {', '.join(held)}" if held else "holds none"
    raise InputError(
        f"the solvers need the gradient of a torch module, and the MAITE model {model.metadata['id']!r} {found}:"
        " give the module itself"
    )


def check_alike(model: Any, module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """See that a MAITE model answers as the module that it holds: what is attacked is what is used.

    Logits, probabilities and one-hot answers are alike if they rank the classes alike.

    module: the module with its preprocessing, from inputs to logits.
    x: some inputs, on any device.

    Raises InputError if the model raises, or its answers differ, as where it scales its inputs and the module does not.
    """
    name = f"the MAITE model {model.metadata['id']!r}"
    rows = [row.float().cpu().numpy() for row in x]
    answers: NDArray[np.float64] = guarded(
        lambda: np.stack([_array(answer) for answer in model(rows)]), f"{name} raised"
    )
    with torch.no_grad():
        logits = module(x).double().cpu().numpy()
    if answers.shape != logits.shape:
        raise InputError(f"{name} answers with shape {answers.shape}, the module that it holds with {logits.shape}")
    # Sorted by the module's logits, the model's answers must not fall.
    ranked = np.take_along_axis(answers, logits.argsort(axis=1, kind="stable"), axis=1)
    falls = ranked[:, :-1] - ranked[:, 1:]
    span = answers.max(axis=1, keepdims=True) - answers.min(axis=1, keepdims=True)
    if answers.shape[1] == 1:
        falls, span = np.abs(answers - logits), np.abs(logits)
    if (falls > 1e-3 * span).any():
        raise InputError(
            f"{name} and the module that it holds rank the classes differently: does it change its inputs first?"
            f" Give what it does as {arg('preprocess')}, or give the module itself"
        )


def _array(answer: Any) -> NDArray[np.float64]:
    answer = answer.detach().cpu() if isinstance(answer, torch.Tensor) else answer
    return np.asarray(answer, dtype=np.float64).reshape(-1)
