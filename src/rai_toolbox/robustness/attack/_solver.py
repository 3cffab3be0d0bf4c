"""One call of a solver, and a second look at what it returns.

No solver is believed: `check_again` computes the distance of each perturbed input in float64, and asks whether it lies
in ball and box and what the model decides there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.perturbations import minimum_norm, worst_case
from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness._statistics import clopper_pearson_interval
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.attack._under_way import RunsOfSolver

#: The dtype of names of attacks in an array.
NAME = "U16"

_ORDER = {"l1": 1.0, "l2": 2.0, "linf": float("inf"), "l0": 0.0}


@dataclass
class CheckedResult:
    """The result of a solver, checked again."""

    perturbed: torch.Tensor
    # Of those that lie in ball and box and, in a classification, that the model errs at; infinite elsewhere.
    distance: NDArray
    # The model's decision there, -1 where nothing was found. Regression: its outputs, shape (N, outputs).
    prediction: NDArray
    # Regression: the mean absolute error at the perturbed inputs; of the clean input where they were rejected.
    error: NDArray
    rejected: int  # how many a solver called a success, or returned, that are none
    by: NDArray  # which attack returned each
    errors: NDArray  # how many of the draws of the model were errors there, -1 where it is outside; regression: zeros


def run_solver(
    subject: Subject,
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    norm: Norm,
    epsilon: float | torch.Tensor | None = None,
    purpose: tuple[object, ...],
    by: str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    through: Callable[[torch.Tensor], torch.Tensor] | None = None,
    to_the_end: bool = False,
) -> CheckedResult:
    """Run a solver on some samples, the minimum-norm one where no radius is given, and check its result.

    epsilon, shape (N,): the radius, one for all or one for each.
    purpose: names the random numbers.
    by: the name of the attack; by default that of the solver.
    steps, restarts: other than the settings'.
    through: what the solver attacks instead of the model; what it returns is looked at with the model.
    to_the_end: whether the solver goes on after the decision has changed: that of `through` may be another.

    Raises SolveEnded if the time limit has ended another solver of the same piece of work.
    """
    if subject.cut:  # by the solver before this one
        raise SolveEnded("the time limit has come")
    bounds = subject.box.of(x)
    options: dict[str, Any] = {"norm": norm, "bounds": bounds, "generator": subject.generator(*purpose)}
    options["callback"] = RunsOfSolver(subject, purpose)
    sizes = subject.settings.sizes
    options |= {"steps": steps or sizes.steps, "restarts": restarts or sizes.restarts}
    if subject.settings.draws > 1:
        options["samples"] = subject.settings.draws
    asked_of = through or subject.model
    with subject.last_word():
        if epsilon is None:
            solution = minimum_norm(asked_of, x, target, **options)
        else:
            solution = worst_case(asked_of, x, target, epsilon=epsilon, early_stop=not to_the_end, **options)
    with subject.last_word(now=True):
        name = by or ("minimum_norm" if epsilon is None else "worst_case")
        found = check_again(subject, x, target, solution.perturbed.detach(), norm=norm, by=name, epsilon=epsilon)
    if subject.classifies and subject.settings.draws == 1:  # other draws vote otherwise where they are nearly even
        found.rejected = int((as_numpy(solution.success) & ~np.isfinite(found.distance)).sum())
    return found


def check_again(
    subject: Subject,
    x: torch.Tensor,
    target: torch.Tensor,
    perturbed: torch.Tensor,
    *,
    norm: Norm,
    by: str,
    epsilon: float | torch.Tensor | None = None,
) -> CheckedResult:
    """Return what perturbed inputs are worth: how far they are, whether they lie in ball and box, what the model says.

    by: the name of the attack that they are of.
    epsilon, shape (N,): the radius of the ball, if there is one.
    """
    bounds = subject.box.of(x)
    with torch.no_grad():
        output = subject.model(perturbed)
    distance = distances(perturbed, x, norm)
    inside = np.isfinite(distance)
    if bounds is not None:
        within = (perturbed >= bounds[0]) & (perturbed <= bounds[1])
        inside &= as_numpy(within.flatten(1).all(dim=1))
    if epsilon is not None:
        radius = as_numpy(epsilon.double()) if isinstance(epsilon, torch.Tensor) else epsilon
        inside &= distance <= radius + _rounding(x, norm)
        distance = np.minimum(distance, radius)
    names = np.full(len(x), by, NAME)
    if not subject.classifies:
        with torch.no_grad():
            unperturbed = mean_absolute_error(subject.model(x), target)
        error = np.where(inside, as_numpy(mean_absolute_error(output, target)), as_numpy(unperturbed))
        return CheckedResult(
            perturbed, np.where(inside, distance, np.inf), as_numpy(output), error, int((~inside).sum()), names,
            np.zeros(len(x), np.int64),
        )  # fmt: skip
    errors = errors_at(subject, perturbed, target, output)
    wrong = inside & breaks(errors, subject.settings.draws)
    # A random model may answer the sample itself otherwise now: an error at every epsilon, but the unperturbed one.
    distance = np.maximum(distance, np.finfo(np.float32).tiny)
    return CheckedResult(
        perturbed=perturbed,
        distance=np.where(wrong, distance, np.inf),
        prediction=np.where(wrong, as_numpy(decisions(output)), -1),
        error=np.zeros(len(x)),
        rejected=0,
        by=names,
        errors=np.where(inside, errors, -1),
    )


def errors_at(subject: Subject, x: torch.Tensor, target: torch.Tensor, output: torch.Tensor) -> NDArray:
    """Return how many of the draws of the model at each input are errors; none of them was seen by a solver.

    output: the first of the model's answers at `x`.
    """
    errors = misclassified(output, target).long()
    with torch.no_grad():
        for _ in range(subject.settings.draws - 1):
            errors += misclassified(subject.model(x), target)
    return as_numpy(errors)


def breaks(errors: NDArray, draws: int) -> NDArray:
    """Say where the model errs; a random one, where it is not shown that it errs less than half of the time."""
    return errors > 0 if draws == 1 else interval_of_errors(errors, draws)[1] >= 0.5


def interval_of_errors(errors: NDArray, draws: int) -> tuple[NDArray, NDArray]:
    """Return the ends of the 95 % interval of the probability of an error, from errors among so many draws."""
    low, high = np.array([clopper_pearson_interval(count, draws) for count in range(draws + 1)]).T
    return low[errors], high[errors]


def distances(perturbed: torch.Tensor, x: torch.Tensor, norm: Norm) -> NDArray:
    """Return the norm of each perturbation, computed in float64 from the stored values."""
    delta = (perturbed.double() - x.double()).flatten(1)
    return as_numpy(torch.linalg.vector_norm(delta, _ORDER[norm], dim=1))


def _rounding(x: torch.Tensor, norm: Norm) -> float:
    """Return by how much rounding `x + delta` to the dtype can lengthen delta."""
    unit = torch.finfo(x.dtype).eps * max(1e-30, float(x.abs().max()))
    return unit * {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel()), "l0": 0.0}[norm]


def decisions(output: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] > 0).long() if output.shape[1] == 1 else output.argmax(dim=1)


def mean_absolute_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.double() - target.double()).abs().mean(dim=1)


def as_numpy(tensor: torch.Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()
