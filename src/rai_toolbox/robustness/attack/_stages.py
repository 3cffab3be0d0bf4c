"""Each stage's work on a batch: the unperturbed outputs, the search for the nearest error, the attack at each radius.

Each function returns arrays, which the journal keeps. No solver is believed: this file checks each perturbed input
again, its distance in float64, its bounds, and the model's decision.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rai_toolbox.perturbations import minimum_norm, worst_case
from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness.attack._settings import Box, Norm, Settings
from rai_toolbox.robustness.data._samples import Samples
from rai_toolbox.robustness.models._load import Evaluated

__all__ = ["AttackContext", "attack", "clean", "confirm", "distances", "look_at", "search"]

_ORDER = {"l1": 1.0, "l2": 2.0, "linf": float("inf"), "l0": 0.0}


@dataclass
class AttackContext:
    """The inputs of the work on a batch.

    Attributes
    ----------
    model, samples, targets, box, settings
        The model, its data, the bounds and the settings.
    device : torch.device
        Where.
    shown : frozenset of int
        The samples whose perturbed inputs are kept for the gallery, chosen before anything is known about them.
    late : callable or None
        Asked after each run of a solver whether the time limit has come.
    cut : bool
        Whether it has ended a solver before its last run, since this was set to False.
    """

    model: Evaluated
    samples: Samples
    targets: NDArray
    box: Box
    settings: Settings
    device: torch.device
    shown: frozenset[int] = frozenset()
    late: Callable[[], bool] | None = None
    cut: bool = False

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.samples) // self.settings.batch_size)

    @property
    def classifies(self) -> bool:
        """Whether the task has labels."""
        return self.settings.task == "classification"

    @property
    def modules(self) -> list[nn.Module]:
        """The user's modules: those with a training mode."""
        return [part for part in (self.model.model, self.model.preprocess) if isinstance(part, nn.Module)]

    def span(self, batch: int) -> tuple[int, int]:
        """Return the first index of a batch and the one after its last."""
        size = self.settings.batch_size
        return batch * size, min(len(self.samples), (batch + 1) * size)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets on the device."""
        x = self.samples.inputs(start, stop, self.model.dtype).to(self.device)
        return x, torch.from_numpy(self.targets[start:stop]).to(self.device)

    def subset(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of some samples on the device."""
        x = self.samples.gather(indices, self.model.dtype).to(self.device)
        return x, torch.from_numpy(self.targets[np.asarray(indices, dtype=np.int64)]).to(self.device)

    def between_runs(self, *_: object) -> bool:
        """Return whether a solver ends here, after one of its runs: it has called this."""
        self.cut |= self.late is not None and self.late()
        return self.cut

    def generator(self, *what: object) -> torch.Generator:
        """Return a generator of its own for one purpose: which process does the work, and when, does not show."""
        words = repr((self.settings.seed, *what)).encode()
        seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1
        return torch.Generator(device="cpu").manual_seed(seed)


def clean(context: AttackContext, batch: int) -> dict[str, Any]:
    """Return the model's predictions on the unperturbed inputs."""
    begun = time.perf_counter()
    x, target = context.batch(*context.span(batch))
    with torch.no_grad():
        output = context.model(x)
    finite = output.isfinite().all(dim=1)
    piece = {"finite": _numpy(finite)}
    if context.classifies:
        piece["prediction"] = _numpy(_decisions(output))
        # A NaN among the logits is no right decision.
        piece["correct"] = _numpy(~misclassified(output, target) & finite)
    else:
        piece["prediction"] = _numpy(output.double())
        piece["error"] = _numpy(_error(output, target))
    return piece | {"seconds": time.perf_counter() - begun}


def search(context: AttackContext, norm: Norm, batch: int, correct: NDArray) -> dict[str, Any]:
    """Return how far the nearest error is from each sample, from the minimum-norm solver.

    Parameters
    ----------
    correct : NDArray of bool
        Which samples of the batch the model gets right; the others are at distance 0.
    """
    begun, forwards = time.perf_counter(), context.model.forwards
    start, stop = context.span(batch)
    distance = np.where(correct, np.inf, 0.0)
    prediction = np.full(stop - start, -1)
    rows = np.flatnonzero(correct)
    kept = _Kept(context, start, stop)
    rejected = 0
    if len(rows):
        x, target = (part[torch.from_numpy(rows)] for part in context.batch(start, stop))
        found = attack(context, x, target, norm=norm, purpose=("search", norm))
        distance[rows], prediction[rows], rejected = found.distance, found.prediction, found.rejected
        kept.take(rows, found)
    return {
        "distance": distance,
        "prediction": prediction,
        "rejected": rejected,
        "forwards": context.model.forwards - forwards,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


def confirm(
    context: AttackContext, norm: Norm, batch: int, grid: Sequence[float], open_below: NDArray | None
) -> dict[str, Any]:
    """Return the result of the fixed-budget solver at each radius.

    Parameters
    ----------
    grid : sequence of float
        The radii, ascending.
    open_below : NDArray or None
        Classification: the distance at which each sample is known to be broken (0: wrong from the start). A
        radius is tried on those that stand yet. Regression: None; each radius is tried on all.
    """
    begun, forwards = time.perf_counter(), context.model.forwards
    start, stop = context.span(batch)
    kept = _Kept(context, start, stop)
    rejected = 0
    if open_below is None:
        error = np.zeros((len(grid), stop - start))
        x, target = context.batch(start, stop)
        for level, epsilon in enumerate(grid):
            found = attack(context, x, target, norm=norm, epsilon=epsilon, purpose=("confirm", norm, level))
            # A larger radius allows every change that a smaller one does.
            error[level] = found.error if level == 0 else np.maximum(error[level - 1], found.error)
            rejected += found.rejected
            if context.cut:
                break
            if level == len(grid) // 2:
                kept.take(np.arange(stop - start), found)
        results: dict[str, Any] = {"error": error}
    else:
        distance = np.array(open_below, dtype=np.float64)
        prediction = np.full(stop - start, -1)
        for level, epsilon in enumerate(grid):
            rows = np.flatnonzero(distance > epsilon)
            if not len(rows):
                break
            x, target = (part[torch.from_numpy(rows)] for part in context.batch(start, stop))
            found = attack(
                context,
                x,
                target,
                norm=norm,
                epsilon=epsilon,
                purpose=("confirm", norm, level),
            )
            nearer = found.distance < distance[rows]
            distance[rows] = np.where(nearer, found.distance, distance[rows])
            prediction[rows] = np.where(nearer, found.prediction, prediction[rows])
            rejected += found.rejected
            kept.take(rows[nearer], found, nearer)
            if context.cut:
                break
        results = {"distance": distance, "prediction": prediction}
    return results | {
        "rejected": rejected,
        "forwards": context.model.forwards - forwards,
        "seconds": time.perf_counter() - begun,
        **kept.arrays(),
    }


@dataclass
class Attacked:
    """The result of a solver, checked again.

    Attributes
    ----------
    perturbed : Tensor
        The perturbed inputs.
    distance : NDArray
        Of those that lie in ball and box and, in a classification, that the model errs at; infinite elsewhere.
    prediction : NDArray
        The model's decision there, -1 where nothing was found. Regression: its outputs, shape (N, outputs).
    error : NDArray
        Regression: the mean absolute error at the perturbed inputs; of the clean input where they were rejected.
    rejected : int
        How many a solver called a success, or returned, that are none.
    """

    perturbed: torch.Tensor
    distance: NDArray
    prediction: NDArray
    error: NDArray
    rejected: int


def attack(
    context: AttackContext,
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    norm: Norm,
    epsilon: float | torch.Tensor | None = None,
    purpose: tuple[object, ...],
    steps: int | None = None,
    restarts: int | None = None,
    through: Callable[[torch.Tensor], torch.Tensor] | None = None,
    to_the_end: bool = False,
) -> Attacked:
    """Run a solver on some samples, the minimum-norm one where no radius is given, and check its result.

    Parameters
    ----------
    epsilon : float or Tensor of shape (N,), optional
        The radius, one for all or one for each.
    purpose : tuple
        Names the random numbers.
    steps, restarts : int or None
        Other than the settings'.
    through : callable, optional
        What the solver attacks instead of the model; what it returns is looked at with the model.
    to_the_end : bool
        Whether the solver goes on after the decision has changed: that of `through` may be another.
    """
    bounds = context.box.of(x)
    options: dict[str, Any] = {"norm": norm, "bounds": bounds, "generator": context.generator(*purpose)}
    options["callback"] = context.between_runs
    asked = {"steps": steps or context.settings.steps, "restarts": restarts or context.settings.restarts}
    options |= {name: value for name, value in asked.items() if value is not None}
    asked_of = through or context.model
    if epsilon is None:
        solution = minimum_norm(asked_of, x, target, **options)
    else:
        solution = worst_case(asked_of, x, target, epsilon=epsilon, early_stop=not to_the_end, **options)
    found = look_at(context, x, target, solution.perturbed.detach(), norm=norm, epsilon=epsilon)
    if context.classifies:
        found.rejected = int((_numpy(solution.success) & ~np.isfinite(found.distance)).sum())
    return found


def look_at(
    context: AttackContext,
    x: torch.Tensor,
    target: torch.Tensor,
    perturbed: torch.Tensor,
    *,
    norm: Norm,
    epsilon: float | torch.Tensor | None = None,
) -> Attacked:
    """Return what perturbed inputs are worth: how far they are, whether they lie in ball and box, what the model says.

    Parameters
    ----------
    epsilon : float or Tensor of shape (N,), optional
        The radius of the ball, if there is one.
    """
    bounds = context.box.of(x)
    with torch.no_grad():
        output = context.model(perturbed)
    distance = distances(perturbed, x, norm)
    inside = np.isfinite(distance)
    if bounds is not None:
        within = (perturbed >= bounds[0]) & (perturbed <= bounds[1])
        inside &= _numpy(within.flatten(1).all(dim=1))
    if epsilon is not None:
        radius = _numpy(epsilon.double()) if isinstance(epsilon, torch.Tensor) else epsilon
        inside &= distance <= radius + _rounding(x, norm)
        distance = np.minimum(distance, radius)
    if not context.classifies:
        with torch.no_grad():
            unperturbed = _error(context.model(x), target)
        error = np.where(inside, _numpy(_error(output, target)), _numpy(unperturbed))
        return Attacked(perturbed, np.where(inside, distance, np.inf), _numpy(output), error, int((~inside).sum()))
    wrong = inside & _numpy(misclassified(output, target))
    return Attacked(
        perturbed=perturbed,
        distance=np.where(wrong, distance, np.inf),
        prediction=np.where(wrong, _numpy(_decisions(output)), -1),
        error=np.zeros(len(x)),
        rejected=0,
    )


def distances(perturbed: torch.Tensor, x: torch.Tensor, norm: Norm) -> NDArray:
    """Return the norm of each perturbation, computed in float64 from the stored values."""
    delta = (perturbed.double() - x.double()).flatten(1)
    return _numpy(torch.linalg.vector_norm(delta, _ORDER[norm], dim=1))


def _rounding(x: torch.Tensor, norm: Norm) -> float:
    """Return by how much rounding `x + delta` to the dtype can lengthen delta."""
    unit = torch.finfo(x.dtype).eps * max(1e-30, float(x.abs().max()))
    return unit * {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel()), "l0": 0.0}[norm]


def _decisions(output: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] > 0).long() if output.shape[1] == 1 else output.argmax(dim=1)


def _error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.double() - target.double()).abs().mean(dim=1)


def _numpy(tensor: torch.Tensor) -> NDArray:
    return tensor.detach().cpu().numpy()


class _Kept:
    """The perturbed inputs of a batch that the gallery may show."""

    def __init__(self, context: AttackContext, start: int, stop: int) -> None:
        self._rows = {index - start for index in context.shown if start <= index < stop}
        self._start = start
        self._found: dict[int, tuple[NDArray, float, NDArray]] = {}

    def take(self, rows: NDArray, found: Attacked, chosen: NDArray | None = None) -> None:
        at = np.flatnonzero(chosen) if chosen is not None else np.arange(len(rows))
        for row, position in zip(rows.tolist(), at.tolist(), strict=True):
            if row in self._rows and np.isfinite(found.distance[position]):
                perturbed = _numpy(found.perturbed[position].float())
                self._found[row] = perturbed, float(found.distance[position]), found.prediction[position]

    def arrays(self) -> Mapping[str, NDArray]:
        rows = sorted(self._found)
        if not rows:
            return {}
        return {
            "shown_index": np.array(rows) + self._start,
            "shown_input": np.stack([self._found[row][0] for row in rows]),
            "shown_distance": np.array([self._found[row][1] for row in rows]),
            "shown_prediction": np.array([self._found[row][2] for row in rows]),
        }
