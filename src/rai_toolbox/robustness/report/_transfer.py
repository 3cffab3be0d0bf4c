"""Errors of one model tried on another: how many of them the other makes too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rai_toolbox import evaluating
from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._imports import guarded
from rai_toolbox.robustness.attack._solver import as_numpy, decisions
from rai_toolbox.robustness.models._load import Evaluated
from rai_toolbox.robustness.report._evaluation import Evaluation

# At a time through a model.
_ROWS = 128
# So many answers may differ by rounding from those of the evaluation.
_OTHERWISE = 0.02


@dataclass(frozen=True)
class Transfer:
    """Errors of one model, tried on another.

    Attributes
    ----------
    norm : str
        Of the changes.
    epsilon : float
        The radius.
    source, target : str
        The model that the changes were found for, and the one that they were tried on.
    errors : int
        How many samples, of those that both models get right, the source gets wrong at its change, lengthened to the
        radius (in L0 as it is).
    transferred : int
        How many of these the target gets wrong at the same input.
    """

    norm: str
    epsilon: float
    source: str
    target: str
    errors: int
    transferred: int


def transfers(
    named: Mapping[str, Evaluation], models: Sequence[Callable[[Tensor], Any]], radii: Mapping[str, Sequence[float]]
) -> Iterator[Transfer]:
    """Yield what each model's errors do to each other one, by norm and radius.

    Raises InputError if there is not a model for each evaluation, one answers otherwise than it did, or is random, or
    an evaluation has no points.
    """
    if len(models) != len(named):
        raise InputError(f"{len(named)} evaluations need {len(named)} models, in their order; {len(models)} were given")
    asked = {name: _Asked(name, one, model) for (name, one), model in zip(named.items(), models, strict=True)}
    for norm, grid in radii.items():
        for source, target in permutations(named, 2):
            one = named[source]
            if norm not in one.examples:
                raise InputError(f"{source!r} has no perturbed inputs in {norm}: nothing of it can be tried")
            shown = one.examples[norm]
            right = asked[source].right(shown.index) & asked[target].right(shown.index)
            for epsilon in grid:
                rows = np.flatnonzero(right & (shown.distance > 0) & (shown.distance <= epsilon))
                points = _lengthened(one, norm, rows, epsilon)
                labels = asked[source].labels(shown.index[rows])
                errs = asked[source].answers(points) != labels
                also = asked[target].answers(points[errs]) != labels[errs]
                yield Transfer(norm, epsilon, source, target, int(errs.sum()), int(also.sum()))


def _lengthened(one: Evaluation, norm: str, rows: NDArray, epsilon: float) -> NDArray:
    """Return changed inputs, their changes as long as the radius, within the bounds."""
    shown = one.examples[norm]
    x, perturbed = shown.original[rows], shown.perturbed[rows]
    if norm == "l0" or not len(rows):
        return perturbed
    factor = (epsilon / shown.distance[rows]).reshape(-1, *[1] * (x.ndim - 1))
    bounds = one.settings["bounds"]
    low, high = (
        default if bounds[end] is None else np.asarray(bounds[end], np.float32)
        for end, default in (("lower", -np.inf), ("upper", np.inf))
    )
    return np.clip(x + (perturbed - x) * factor, low, high).astype(perturbed.dtype)


class _Asked:
    """A model that is asked for decisions, beside what its evaluation knows of the samples."""

    def __init__(self, name: str, one: Evaluation, model: Callable[[Tensor], Any]) -> None:
        if one.settings.get("draws", 1) > 1:
            raise InputError(f"{name!r} is a random model: whether its errors transfer differs from draw to draw")
        self._model = Evaluated(model)
        self._name = name
        first = next(self._model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._places = {index: place for place, index in enumerate(one.index.tolist())}
        self._label, self._correct = one.label, one.correct
        for shown in one.examples.values():
            answers, before = self.answers(shown.original), one.prediction[self._rows(shown.index)]
            otherwise = int((answers != before).sum())
            if otherwise > _OTHERWISE * len(answers):
                raise InputError(
                    f"the model given for {name!r} answers otherwise than in its evaluation, on {otherwise} of"
                    f" {len(answers)} samples: give the one that was evaluated, with its weights and preprocessing"
                )

    def _rows(self, index: NDArray) -> NDArray:
        return np.array([self._places[one] for one in index.tolist()], dtype=np.int64)

    def labels(self, index: NDArray) -> NDArray:
        """Return the labels of samples."""
        return self._label[self._rows(index)]

    def right(self, index: NDArray) -> NDArray:
        """Say which samples the model got right, unperturbed."""
        return self._correct[self._rows(index)]

    def answers(self, points: NDArray) -> NDArray:
        """Return the decisions at some inputs."""
        if not len(points):
            return np.zeros(0, np.int64)
        model = self._model.model
        with torch.no_grad(), evaluating(*([model] if isinstance(model, nn.Module) else [])):
            parts = [self._decided(torch.tensor(points[at : at + _ROWS])) for at in range(0, len(points), _ROWS)]
        return np.concatenate(parts)

    def _decided(self, part: Tensor) -> NDArray:
        x = part.to(self._device, self._model.dtype)
        output = guarded(lambda: self._model(x), f"the model given for {self._name!r} raised")
        return as_numpy(decisions(output))
