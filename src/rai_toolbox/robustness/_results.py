"""The result of an evaluation: figures, per-sample outcomes, findings, in one versioned form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._errors import InputError
from ._samples import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["SCHEMA", "SCHEMA_VERSION", "ClassRow", "Curve", "Evaluation", "Examples", "Finding", "Point"]

SCHEMA = "rai-toolbox/evaluation"
SCHEMA_VERSION = 1

Verdict = Literal["ok", "warning", "distrust", "not run"]


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
    """

    epsilon: float
    value: float
    low: float
    high: float
    samples: int
    by_minimum_norm: float | None = None
    also_by_fixed_budget: int = 0


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
    """

    norm: str
    points: tuple[Point, ...]
    median_distance: float | None
    classes: tuple[ClassRow, ...]
    forwards_per_sample: float
    confirmed: bool

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
    """What one diagnostic check found.

    Attributes
    ----------
    check : str
        Its name, a heading of the documentation's page on trust.
    title : str
        The same in words.
    verdict : {"ok", "warning", "distrust", "not run"}
        ``"distrust"``: do not believe the figures.
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
class Evaluation:
    """The result of `evaluate`.

    Attributes
    ----------
    task : {"classification", "regression"}
        What the model predicts.
    complete : bool
        Whether everything was done; a time limit leaves False.
    curves : dict of str to Curve
        By norm.
    findings : tuple of Finding
        What the diagnostic checks found.
    index, label, prediction : NDArray
        Of every evaluated sample: its number, its label (or target values), the model's answer to it unperturbed.
    correct : NDArray of bool
        Whether that is right (classification).
    distance : dict of str to NDArray
        By norm: how far the nearest error found is; 0 where wrong from the start, infinite where none was
        found (classification).
    error : dict of str to NDArray
        By norm, shape (points, samples): the absolute error at each point of the curve (regression).
    class_names : tuple of str
        What the classes are called.
    settings, data, environment, timings : dict
        What was asked for, what it was asked of, with which versions, how long it took in seconds.
    examples : dict of str to Examples
        By norm, for the gallery.
    feature_names : tuple of str or None
        Of a table.
    """

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

    @property
    def trusted(self) -> bool:
        """Whether no check says not to believe the figures."""
        return all(finding.verdict != "distrust" for finding in self.findings)

    @property
    def measure(self) -> str:
        """What the curves are of."""
        return "accuracy" if self.task == "classification" else "mean absolute error"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of results.json; infinite distances are null there."""
        samples: dict[str, Any] = {"index": self.index, "label": self.label, "prediction": self.prediction}
        if self.task == "classification":
            samples["correct"] = self.correct
            # Not measured, where a time limit came first, is -1; no error found is null.
            samples["distance"] = {
                norm: np.nan_to_num(values, nan=-1.0, posinf=np.inf) for norm, values in self.distance.items()
            }
        else:
            samples["error"] = {norm: error.T for norm, error in self.error.items()}
        return _plain(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "task": self.task,
                "complete": self.complete,
                "trusted": self.trusted,
                "settings": self.settings,
                "data": self.data,
                "environment": self.environment,
                "curves": {norm: _curve_dict(curve) for norm, curve in self.curves.items()},
                "diagnostics": [vars(finding) for finding in self.findings],
                "class_names": self.class_names,
                "feature_names": self.feature_names,
                "samples": samples,
                "timings": self.timings,
            }
        )

    def to_json(self) -> str:
        """Return results.json's text: strict JSON, no NaN and no Infinity in it."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_pandas(self) -> DataFrame:
        """Return one row per sample: its label, prediction and distances (or errors at the largest epsilon).

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(self.columns()).set_index("index")

    def columns(self) -> dict[str, NDArray]:
        """Return the per-sample outcomes as flat columns: what samples.csv and `to_pandas` hold."""
        columns = {"index": self.index, **_flat("label", self.label), **_flat("prediction", self.prediction)}
        if self.task == "classification":
            columns["correct"] = self.correct
            columns |= {f"distance_{norm}": values for norm, values in self.distance.items()}
        for norm, error in self.error.items():
            for point, values in zip(self.curves[norm].points, error, strict=True):
                columns[f"error_{norm}_{point.epsilon:g}"] = values
        return columns

    def plot(self) -> Figure:
        """Return a picture of the curves with their intervals, made by matplotlib."""
        from ._pictures import plot_curves

        return plot_curves({"": self})

    def save(self, folder: str | Path) -> Path:
        """Write report.html, curve.png, results.json, examples.npz and the figures as CSV; return the folder.

        Raises
        ------
        InputError
            If the folder cannot be made or written to.
        """
        from ._writing import write_results

        return write_results(self, Path(folder))

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Return the evaluation that a folder or results.json holds, without its examples.

        Raises
        ------
        InputError
            If there is none, or it is of another schema.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{str(path)!r} is not JSON; give a report's folder or its results.json") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise InputError(f"{str(path)!r} is not a results.json of rai-toolbox evaluate")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{str(path)!r} has schema version {content.get('schema_version')!r}, this release reads"
                f" {SCHEMA_VERSION}"
            )
        try:
            return _from_dict(content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{str(path)!r} is damaged: {type(error).__name__} {error}") from None


def _curve_dict(curve: Curve) -> dict[str, Any]:
    return vars(curve) | {
        "points": [vars(point) for point in curve.points],
        "classes": [vars(row) for row in curve.classes],
    }


def _flat(name: str, values: NDArray) -> dict[str, NDArray]:
    if values.ndim == 1:
        return {name: values}
    if values.shape[1] == 1:
        return {name: values[:, 0]}
    return {f"{name}_{column}": values[:, column] for column in range(values.shape[1])}


def _plain(value: Any) -> Any:
    """Return what json can write: lists for arrays, None for what is not finite."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _distances(values: list[float | None]) -> NDArray:
    array = np.array([np.inf if value is None else value for value in values], dtype=np.float64)
    array[array < 0] = np.nan
    return array


def _from_dict(content: dict[str, Any]) -> Evaluation:
    samples = content["samples"]
    classifies = content["task"] == "classification"
    curves = {}
    for norm, entry in content["curves"].items():
        points = tuple(
            Point(**{**point, "high": math.inf if point["high"] is None else point["high"]})
            for point in entry["points"]
        )
        classes = tuple(ClassRow(**{**row, "values": tuple(row["values"])}) for row in entry["classes"])
        curves[norm] = Curve(**{**entry, "points": points, "classes": classes})
    return Evaluation(
        task=content["task"],
        complete=content["complete"],
        curves=curves,
        findings=tuple(Finding(**finding) for finding in content["diagnostics"]),
        index=np.array(samples["index"], dtype=np.int64),
        label=np.array(samples["label"]),
        prediction=np.array(samples["prediction"]),
        correct=np.array(samples["correct"], dtype=bool) if classifies else np.array([], dtype=bool),
        distance={norm: _distances(values) for norm, values in samples.get("distance", {}).items()},
        error={norm: np.array(values, dtype=np.float64).T for norm, values in samples.get("error", {}).items()},
        class_names=tuple(content["class_names"]),
        settings=content["settings"],
        data=content["data"],
        environment=content["environment"],
        timings=content["timings"],
        feature_names=None if content["feature_names"] is None else tuple(content["feature_names"]),
    )
