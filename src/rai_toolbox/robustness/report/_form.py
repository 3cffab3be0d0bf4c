"""The form of results.json: required entries, their types and lengths. A damaged file is refused here."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Annotated, Any, Literal

import msgspec

from rai_toolbox.robustness._errors import InputError

# null stands for what is not finite
Size = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Text = str


class _Point(msgspec.Struct):
    epsilon: Size
    value: float | None
    low: float | None
    high: float | None
    samples: Count
    by_minimum_norm: float | None = None
    also_by_fixed_budget: Count = 0
    also_by_stronger_attacks: Count = 0
    also_by_earlier_points: Count = 0


class _AveragePoint(msgspec.Struct):
    epsilon: Size
    error: float | None
    low: float | None
    high: float | None
    points: Count
    clamped: Count


class _CorruptionPoint(msgspec.Struct):
    severity: Size
    value: float | None
    low: float | None
    high: float | None
    samples: Count


class _Corruption(msgspec.Struct):
    name: Text
    points: Annotated[list[_CorruptionPoint], msgspec.Meta(min_length=1)]


class _ClassRow(msgspec.Struct):
    label: int
    name: Text
    samples: Count
    values: list[float | None]


class _Curve(msgspec.Struct):
    norm: Text
    points: Annotated[list[_Point], msgspec.Meta(min_length=1)]
    median_distance: Size | None
    classes: list[_ClassRow]
    forwards_per_sample: float | None
    confirmed: bool
    average: list[_AveragePoint] = []  # new in version 2


class _Finding(msgspec.Struct):
    check: Text
    title: Text
    verdict: Literal["ok", "warning", "distrust", "not conclusive", "not run"]
    summary: Text
    evidence: dict[str, Any]


class _Samples(msgspec.Struct):
    index: list[Count]
    label: list[int | list[float | None]]
    prediction: list[int | list[float | None]]
    id: list[int | str] | None = None  # new in version 2
    correct: list[bool] | None = None
    distance: dict[str, list[float | None]] = {}
    error: dict[str, list[list[float | None]]] = {}
    error_rate: dict[str, list[list[tuple[float | None, float | None, float | None]]]] = {}
    found_by: dict[str, list[Text | list[Text | None] | None]] = {}


class _Bounds(msgspec.Struct):
    lower: float | list[Any] | None
    upper: float | list[Any] | None


class _Settings(msgspec.Struct):
    bounds: _Bounds


class _Data(msgspec.Struct):
    evaluated: Count
    shape: list[Count]
    minimum: float
    maximum: float
    fingerprint: Text


class _File(msgspec.Struct):
    task: Literal["classification", "regression"]
    complete: bool
    settings: _Settings
    data: _Data
    environment: dict[str, Any]
    curves: Annotated[dict[Literal["l1", "l2", "linf", "l0"], _Curve], msgspec.Meta(min_length=1)]
    findings: list[_Finding]
    class_names: list[Text]
    feature_names: list[Text] | None
    samples: _Samples
    timings: dict[str, float]
    corruptions: dict[str, _Corruption] = {}  # new in version 2


def check_form(content: Any, path: str) -> None:
    """See that `content`, as JSON has it, is of the form that is read.

    Raises InputError if it is not; the message names the entry.
    """
    try:
        file = msgspec.convert(content, type=_File)
    except msgspec.ValidationError as error:
        raise InputError(f"{path!r} is damaged: {error}") from None
    fault = next(_faults(file), None)
    if fault is not None:
        raise InputError(f"{path!r} is damaged: {fault}")


def _faults(file: _File) -> Iterator[str]:
    """What the types cannot say: which entries belong together, and in which range they lie."""
    samples, classifies = file.samples, file.task == "classification"
    if not samples.index:
        yield "there are no samples"
    lists: dict[str, Sized | None] = {"label": samples.label, "prediction": samples.prediction}
    if samples.id is not None:
        lists["id"] = samples.id
    if classifies:
        lists["correct"] = samples.correct
    per_norm = samples.distance if classifies else samples.error
    what = "distance" if classifies else "error"
    lists |= {f"{what}.{norm}": per_norm.get(norm) for norm in file.curves}
    lists |= {f"error_rate.{norm}": rates for norm, rates in samples.error_rate.items()}
    lists |= {f"found_by.{norm}": names for norm, names in samples.found_by.items()}
    for name, values in lists.items():
        if values is None:
            yield f"samples.{name} is missing"
        elif len(values) != len(samples.index):
            yield f"samples.{name} has {len(values)} entries, samples.index has {len(samples.index)}"
    for name in ("label", "prediction"):
        if any(isinstance(value, int) != classifies for value in getattr(samples, name)):
            yield f"samples.{name} has an entry that is no {'class' if classifies else 'list of values'}"
    if classifies:
        for norm, distances in samples.distance.items():
            if any(value is not None and value < 0 and value != -1 for value in distances):
                yield f"samples.distance.{norm} has a negative entry"
            if file.complete and -1 in distances:
                yield f"samples.distance.{norm} has an entry that was not measured, in a complete result"
    for norm, curve in file.curves.items():
        yield from _faults_of_curve(norm, curve, classifies)
        if any(len(row) != len(curve.points) for row in samples.error.get(norm, [])):
            yield f"samples.error.{norm} has a row that is not as long as the curve"
        if any(len(row) != len(curve.points) for row in samples.error_rate.get(norm, [])):
            yield f"samples.error_rate.{norm} has a row that is not as long as the curve"
        if any(
            classifies is isinstance(row, list) or (not classifies and len(row or ()) != len(curve.points))
            for row in samples.found_by.get(norm, [])
        ):
            yield f"samples.found_by.{norm} has an entry of another form"
    for name, corruption in file.corruptions.items():
        if corruption.name != name:
            yield f"corruptions.{name}.name is {corruption.name!r}"
        shares = [share for point in corruption.points for share in (point.value, point.low, point.high)]
        if classifies and not _are_shares(shares):
            yield f"corruptions.{name}.points: an accuracy is not in [0, 1]"


def _faults_of_curve(norm: str, curve: _Curve, classifies: bool) -> Iterator[str]:
    radii = [point.epsilon for point in curve.points]
    if curve.norm != norm:
        yield f"curves.{norm}.norm is {curve.norm!r}"
    if radii != sorted(set(radii)) or radii[0] != 0:
        yield f"curves.{norm}.points: the radii must ascend from 0"
    if curve.average and [point.epsilon for point in curve.average] != radii:
        yield f"curves.{norm}.average: the radii are not those of the curve"
    for point in curve.average if classifies else ():
        if not _are_shares([point.error, point.low, point.high]):
            yield f"curves.{norm}.average: an error at epsilon {point.epsilon:g} is not in [0, 1]"
    for point in curve.points if classifies else ():
        if not _are_shares([point.value, point.low, point.high]):
            yield f"curves.{norm}.points: an accuracy at epsilon {point.epsilon:g} is not in [0, 1]"
    if any(len(row.values) != len(radii) for row in curve.classes):
        yield f"curves.{norm}.classes has a row that is not as long as the curve"


def _are_shares(values: list[float | None]) -> bool:
    return all(value is not None and 0 <= value <= 1 for value in values)
