"""results.json: its schema, how it is written and how it is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._evidence import AveragePoint, Corruption, CorruptionPoint
from rai_toolbox.robustness._results import ClassRow, Curve, Finding, Point, Results, jsonable
from rai_toolbox.robustness.report._form import check_form

SCHEMA = "rai-toolbox/evaluation"
SCHEMA_VERSION = 3
#: The versions that are read.
_READ = (1, 2, SCHEMA_VERSION)


def to_dict(results: Results) -> dict[str, Any]:
    """Return the content of results.json; infinite distances are null there."""
    samples: dict[str, Any] = {"index": results.index, "id": results.ids}
    samples |= {"label": results.label, "prediction": results.prediction}
    if results.task == "classification":
        samples["correct"] = results.correct
        # Not measured, where a time limit came first, is -1; no error found is null.
        samples["distance"] = {
            norm: np.nan_to_num(values, nan=-1.0, posinf=np.inf) for norm, values in results.distance.items()
        }
    else:
        samples["error"] = {norm: error.T for norm, error in results.error.items()}
    if results.error_rate:
        samples["error_rate"] = {norm: rates.swapaxes(0, 1) for norm, rates in results.error_rate.items()}
    if results.found_by:
        samples["found_by"] = {norm: _names(by) for norm, by in results.found_by.items()}
    return jsonable(
        {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "task": results.task,
            "complete": results.complete,
            "trusted": results.trusted,
            "settings": results.settings,
            "data": results.data,
            "environment": results.environment,
            "evidence": [vars(evidence) for evidence in results.evidence],
            "curves": {norm: _curve_dict(curve) for norm, curve in results.curves.items()},
            "corruptions": {
                name: {"name": name, "points": [vars(point) for point in corruption.points]}
                for name, corruption in results.corruptions.items()
            },
            "findings": [vars(finding) for finding in results.findings],
            "class_names": results.class_names,
            "feature_names": results.feature_names,
            "samples": samples,
            "timings": results.timings,
        }
    )


def to_json(results: Results) -> str:
    """Return the text of results.json: strict JSON, without NaN and Infinity."""
    return json.dumps(to_dict(results), allow_nan=False)


def read(path: Path) -> Results:
    """Return the result that a folder or results.json holds.

    Raises InputError if there is none, it is of another schema, or damaged.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=_refused)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{str(path)!r} is not JSON; give a report's folder or its results.json") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{str(path)!r} is not a results.json of rai-toolbox evaluate")
    if (version := content.get("schema_version")) not in _READ or isinstance(version, bool):
        raise InputError(
            f"{str(path)!r} has schema version {version!r}, this release reads {_READ[0]} to {SCHEMA_VERSION}"
        )
    if version < 3 and "diagnostics" in content:
        content["findings"] = content.pop("diagnostics")  # their name until then
    check_form(content, str(path))
    try:
        return _from_dict(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{str(path)!r} is damaged: {type(error).__name__} {error}") from None


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _curve_dict(curve: Curve) -> dict[str, Any]:
    return vars(curve) | {
        "points": [vars(point) for point in curve.points],
        "average": [vars(point) for point in curve.average],
        "classes": [vars(row) for row in curve.classes],
    }


def _names(by: NDArray) -> list[Any]:
    """Return the names of attacks sample by sample, null for none; of a regression a list for each."""
    names = [[name or None for name in row] for row in np.atleast_2d(by).tolist()]
    return names[0] if by.ndim == 1 else [list(column) for column in zip(*names, strict=True)]


def _attacks(names: list[Any]) -> NDArray:
    """Return what `_names` was given."""
    if any(isinstance(name, list) for name in names):
        return np.stack([_attacks(row) for row in names], axis=1)
    return np.array([name or "" for name in names])


def _distances(values: list[float | None]) -> NDArray:
    array = np.array([np.inf if value is None else value for value in values], dtype=np.float64)
    array[array < 0] = np.nan
    return array


def _from_dict(content: dict[str, Any]) -> Results:
    samples = content["samples"]
    classifies = content["task"] == "classification"
    curves = {}
    for norm, entry in content["curves"].items():
        points = tuple(Point(**_finite(point)) for point in entry["points"])
        average = tuple(AveragePoint(**_finite(point)) for point in entry.get("average", ()))  # version 1 has none
        classes = tuple(ClassRow(**{**row, "values": tuple(row["values"])}) for row in entry["classes"])
        curves[norm] = Curve(**{**entry, "points": points, "classes": classes, "average": average})
    corruptions = {
        name: Corruption(name, tuple(CorruptionPoint(**_finite(point)) for point in entry["points"]))
        for name, entry in content.get("corruptions", {}).items()
    }
    ids = samples.get("id")
    return Results(
        task=content["task"],
        complete=content["complete"],
        curves=curves,
        findings=tuple(Finding(**finding) for finding in content["findings"]),
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
        corruptions=corruptions,
        ids=None if ids is None else tuple(ids),
        error_rate={
            norm: np.array(rates, dtype=np.float64).swapaxes(0, 1)
            for norm, rates in samples.get("error_rate", {}).items()
        },
        found_by={norm: _attacks(names) for norm, names in samples.get("found_by", {}).items()},
    )


def _finite(point: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a point; null stands for infinity."""
    return point | {name: math.inf for name in ("value", "error", "low", "high") if point.get(name, 0) is None}
