"""The parts of a result: figures, per-sample outcomes, findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._evidence import AveragePoint, Corruption, Evidence, evidence_of

Task = Literal["classification", "regression"]
Verdict = Literal["ok", "warning", "distrust", "not conclusive", "not run"]

#: The evidence of a check that applies, and had nothing to look at or raised.
COULD_NOT_BE_MADE: Mapping[str, Any] = {"could_not_be_made": True}


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes
    ----------
    epsilon : float
        The radius; 0 is the unperturbed data.
    value : float
        Robust accuracy, or for regression the mean absolute error under attack.
    low, high : float
        The ends of its 95 % interval (Wilson for accuracies, normal for errors).
    samples : int
        How many samples it is of.
    by_minimum_norm : float or None
        The accuracy that the minimum-norm solver alone leaves.
    also_by_fixed_budget : int
        How many samples only the fixed-budget solver broke within this radius.
    also_by_stronger_attacks : int
        How many samples only an attack without the gradient broke, or a random point: where a check asked for such
        attacks, and where the average was measured.
    also_by_earlier_points : int
        How many samples only a point of an earlier evaluation broke, when the minimum-norm solver was done.
    """

    epsilon: float
    value: float
    low: float
    high: float
    samples: int
    by_minimum_norm: float | None = None
    also_by_fixed_budget: int = 0
    also_by_stronger_attacks: int = 0
    also_by_earlier_points: int = 0


@dataclass(frozen=True)
class ClassRow:
    """The samples of one class: how many, and the accuracy at each point of the curve."""

    label: int
    name: str
    samples: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy (or error) against epsilon in one norm.

    Attributes
    ----------
    norm : str
        Of the perturbations.
    points : tuple of Point
        The first is epsilon 0.
    median_distance : float or None
        Half of the correctly classified samples have an error nearer than this; None for regression and where
        fewer than half have one.
    classes : tuple of ClassRow
        The curve of each class.
    forwards_per_sample : float
        How many times a sample went through the model.
    confirmed : bool
        Whether the fixed-budget solver has tried every sample of it.
    average : tuple of AveragePoint
        The model at random points of the same balls, at the same radii; empty where none were drawn.
    """

    norm: str
    points: tuple[Point, ...]
    median_distance: float | None
    classes: tuple[ClassRow, ...]
    forwards_per_sample: float
    confirmed: bool
    average: tuple[AveragePoint, ...] = ()

    def at(self, epsilon: float) -> Point:
        """Return the point at a reported epsilon.

        Raises
        ------
        KeyError
            If `epsilon` was not reported.
        """
        for point in self.points:
            if math.isclose(point.epsilon, epsilon, rel_tol=1e-9, abs_tol=0.0):
                return point
        raise KeyError(f"epsilon {epsilon:g} was not evaluated; {[point.epsilon for point in self.points]} were")


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    Attributes
    ----------
    check : str
        Its name, a heading of the documentation's page on trust.
    title : str
        The same in words.
    verdict : {"ok", "warning", "distrust", "not conclusive", "not run"}
        ``"distrust"``: do not believe the figures. ``"not conclusive"``: the check was too weak to tell.
    summary : str
        One sentence.
    evidence : dict
        The numbers that it rests on.
    """

    check: str
    title: str
    verdict: Verdict
    summary: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Examples:
    """Perturbed inputs of one norm that the gallery shows, nearest first.

    Attributes
    ----------
    index : NDArray of int, shape (K,)
        Which samples.
    original, perturbed : NDArray of float32, shape (K, ...)
        Inputs before and after.
    distance : NDArray, shape (K,)
        Between them.
    prediction : NDArray, shape (K,) or (K, outputs)
        Of the perturbed input.
    """

    index: NDArray
    original: NDArray
    perturbed: NDArray
    distance: NDArray
    prediction: NDArray


@dataclass(frozen=True)
class Results:
    """The data of an `Evaluation`, which documents each attribute; the report is made from it."""

    task: Task
    complete: bool
    curves: Mapping[str, Curve]
    findings: tuple[Finding, ...]
    index: NDArray
    label: NDArray
    prediction: NDArray
    correct: NDArray
    distance: Mapping[str, NDArray]
    error: Mapping[str, NDArray]
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    timings: Mapping[str, float]
    examples: Mapping[str, Examples] = field(default_factory=dict)
    feature_names: tuple[str, ...] | None = None
    corruptions: Mapping[str, Corruption] = field(default_factory=dict)
    ids: tuple[int | str, ...] | None = None
    found_by: Mapping[str, NDArray] = field(default_factory=dict)
    error_rate: Mapping[str, NDArray] = field(default_factory=dict)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What the figures are evidence of."""
        return evidence_of(
            accuracy=self.task == "classification",
            average=any(curve.average for curve in self.curves.values()),
            corruptions=self.corruptions,
            queries=None if self.settings.get("gradient", True) else self.settings.get("queries"),
        )

    @property
    def trusted(self) -> bool:
        """Whether no check says not to believe the figures."""
        return all(finding.verdict != "distrust" for finding in self.findings)

    @property
    def unmade(self) -> tuple[str, ...]:
        """The names of the checks that apply and could not be made."""
        return tuple(finding.check for finding in self.findings if finding.evidence.get("could_not_be_made"))

    @property
    def measure(self) -> str:
        """The quantity of the curves: accuracy, or mean absolute error."""
        return "accuracy" if self.task == "classification" else "mean absolute error"

    def columns(self) -> dict[str, NDArray]:
        """Return the per-sample outcomes as flat columns: what samples.csv and `to_pandas` hold."""
        columns: dict[str, NDArray] = {"index": self.index}
        if self.ids is not None:
            columns["id"] = np.array(self.ids, dtype=object)
        columns |= {**_flat("label", self.label), **_flat("prediction", self.prediction)}
        if any(name != str(label) for label, name in enumerate(self.class_names)):
            columns |= {"label_name": self._named(self.label), "prediction_name": self._named(self.prediction)}
        if self.task == "classification":
            columns["correct"] = self.correct
            columns |= {f"distance_{norm}": values for norm, values in self.distance.items()}
            columns |= {f"found_by_{norm}": names for norm, names in self.found_by.items()}
        for norm, error in self.error.items():
            columns |= self._by_radius("error", norm, error)
            columns |= self._by_radius("found_by", norm, self.found_by[norm]) if norm in self.found_by else {}
        for norm, rates in self.error_rate.items():
            for position, what in enumerate(("error_rate", "error_rate_low", "error_rate_high")):
                columns |= self._by_radius(what, norm, rates[..., position])
        return columns

    def _by_radius(self, what: str, norm: str, rows: NDArray) -> dict[str, NDArray]:
        """Return a column for each point of a curve."""
        radii = [point.epsilon for point in self.curves[norm].points]
        short = [f"{epsilon:g}" for epsilon in radii]
        # radii that agree in six digits are told apart by all of theirs
        names = [repr(epsilon) if short.count(name) > 1 else name for epsilon, name in zip(radii, short, strict=True)]
        return {f"{what}_{norm}_{name}": values for name, values in zip(names, rows, strict=True)}

    def _named(self, labels: NDArray) -> NDArray:
        names = self.class_names
        return np.array([names[label] if label < len(names) else str(label) for label in labels.tolist()], dtype=object)


def _flat(name: str, values: NDArray) -> dict[str, NDArray]:
    if values.ndim == 1:
        return {name: values}
    if values.shape[1] == 1:
        return {name: values[:, 0]}
    return {f"{name}_{column}": values[:, column] for column in range(values.shape[1])}


def jsonable(value: Any) -> Any:
    """Return a value that json can write: lists for arrays, None for numbers that are not finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return value
