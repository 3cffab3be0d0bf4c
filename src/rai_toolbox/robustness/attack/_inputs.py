"""Perturbed inputs themselves, for those who go on with them: what the stages of a run find, at one radius or none."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import check_again, run_solver
from rai_toolbox.robustness.attack._stages import clean
from rai_toolbox.robustness.attack._subject import Subject

# How far past the nearest error an input is moved, where the radius allows it.
_PAST = 1.01


def nearest_errors(subject: Subject, norm: Norm, x: Tensor, target: Tensor) -> tuple[Tensor, NDArray]:
    """Return the nearest inputs that the model gets wrong, and how far they are, as the search of a run finds them.

    An input that is wrong from the start, at distance 0, or has no error that was found, at infinity, stays as it is.
    The samples of the subject are one batch, `x`.
    """
    correct = clean(subject, 0)["correct"]
    perturbed, distance = x.clone(), np.where(correct, np.inf, 0.0)
    rows = np.flatnonzero(correct)
    if rows.size:
        found = run_solver(subject, x[rows], target[rows], norm=norm, purpose=("search", norm))
        nearer = np.flatnonzero(np.isfinite(found.distance))
        perturbed[rows[nearer]] = found.perturbed[nearer]
        distance[rows] = found.distance
    return perturbed, distance


def worst_inputs(subject: Subject, norm: Norm, epsilon: float, x: Tensor, target: Tensor) -> tuple[Tensor, NDArray]:
    """Return the worst inputs within a radius, and the distance of each that the model gets wrong, else infinity.

    They are wrong where a sample does not stand in a run at this one radius: the search first, then the fixed-budget
    solver on what still stands. The samples of the subject are one batch, `x`.
    """
    perturbed, distance = nearest_errors(subject, norm, x, target)
    rows = np.flatnonzero(distance > epsilon)
    broken = np.flatnonzero((distance > 0) & (distance <= epsilon))
    if broken.size and norm != "l0":
        perturbed[broken] = _past(
            subject, norm, epsilon, x[broken], target[broken], perturbed[broken], distance[broken]
        )
    if rows.size:
        purpose = ("confirm", norm, 0)
        found = run_solver(subject, x[rows], target[rows], norm=norm, epsilon=epsilon, purpose=purpose)
        perturbed[rows], distance[rows] = found.perturbed, found.distance
    return perturbed, distance


def _past(
    subject: Subject, norm: Norm, epsilon: float, x: Tensor, target: Tensor, found: Tensor, distance: NDArray
) -> Tensor:
    """Return nearest errors moved past the boundary: on it, rounding in a batch of another size could undo them."""
    factor = torch.from_numpy(np.minimum(_PAST, epsilon / distance)).to(x)
    there = x + (found - x) * factor.view(-1, *[1] * (x.ndim - 1))
    bounds = subject.box.of(x)
    if bounds is not None:
        there = torch.clamp(there, *bounds)
    again = check_again(subject, x, target, there, norm=norm, by="", epsilon=epsilon)
    wrong = torch.from_numpy(np.isfinite(again.distance)).to(x.device)
    return torch.where(wrong.view(-1, *[1] * (x.ndim - 1)), there, found)
