"""Two evaluations side by side, on the same samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import as_folder
from rai_toolbox.robustness._results import jsonable
from rai_toolbox.robustness._statistics import McNemar, mcnemar, wilson_interval
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._pictures import curve_drawing, curve_png
from rai_toolbox.robustness.report._report import render
from rai_toolbox.robustness.report._writing import csv_text, write_files

__all__ = ["ComparedPoint", "Comparison", "compare"]


@dataclass(frozen=True)
class ComparedPoint:
    """Two models at one epsilon.

    Attributes
    ----------
    epsilon : float
        The radius.
    first, second : float
        Their accuracies.
    first_interval, second_interval : tuple of float
        With their 95 % Wilson intervals.
    test : McNemar
        Whether the samples on which they differ speak for one of them.
    """

    epsilon: float
    first: float
    second: float
    first_interval: tuple[float, float]
    second_interval: tuple[float, float]
    test: McNemar


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes
    ----------
    names : tuple of str
        The names of the two.
    evaluations : tuple of Evaluation
        The two.
    norms : dict of str to tuple of ComparedPoint
        By norm, at every epsilon that one of them reported.
    """

    names: tuple[str, str]
    evaluations: tuple[Evaluation, Evaluation]
    norms: Mapping[str, tuple[ComparedPoint, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of comparison.json."""
        points = {
            norm: [vars(point) | {"test": vars(point.test)} for point in points] for norm, points in self.norms.items()
        }
        return jsonable({"schema": "rai-toolbox/comparison", "schema_version": 1, "names": self.names, "norms": points})

    def by_name(self) -> dict[str, Evaluation]:
        """Return the evaluations by their names."""
        return dict(zip(self.names, self.evaluations, strict=True))

    def save(self, folder: str | Path) -> Path:
        """Write comparison.html, comparison.png, comparison.csv and comparison.json; return the folder.

        Raises
        ------
        InputError
            If the folder cannot be made or written to.
        """
        return write_files(as_folder(folder), COMPARISON_FILES, self)


def _html(comparison: Comparison) -> str:
    drawings = {norm: curve_drawing(comparison.by_name(), norm) for norm in comparison.norms}
    return render("comparison.html.j2", c=comparison, drawings=drawings)


def _csv(comparison: Comparison) -> str:
    rows = [["norm", "epsilon", *comparison.names, "only_first", "only_second", "p_value"]]
    rows += [
        [norm, point.epsilon, point.first, point.second, *vars(point.test).values()]
        for norm, points in comparison.norms.items()
        for point in points
    ]
    return csv_text(rows)


#: The files of a comparison's folder.
COMPARISON_FILES: Mapping[str, Callable[[Comparison], bytes | str | None]] = {
    "comparison.html": _html,
    "comparison.png": lambda comparison: curve_png(comparison.by_name()),
    "comparison.csv": _csv,
    "comparison.json": lambda comparison: json.dumps(comparison.to_dict(), allow_nan=False),
}


def compare(first: Evaluation | str | Path, second: Evaluation | str | Path) -> Comparison:
    """Compare two classifiers that were evaluated on the same samples.

    Whether a sample stands at an epsilon is known from the distance of its nearest error, so the epsilons
    need not be the same; at those that only one of them reported, the other's fixed-budget solver has not
    been run.

    Parameters
    ----------
    first, second : Evaluation or path
        The results, or the folders or results.json files that hold them.

    Raises
    ------
    InputError
        If they are of different samples, share no norm, or are no complete classifications.
    """
    pair = tuple(one if isinstance(one, Evaluation) else Evaluation.load(one) for one in (first, second))
    names = _names(first, second, pair)
    for name, one in zip(names, pair, strict=True):
        if one.task != "classification":
            raise InputError(f"{name!r} is a regression; classifiers are compared")
        if not one.complete:
            raise InputError(f"{name!r} is a partial result; finish it with {arg('resume', True)} first")
    a, b = pair
    if a.data["fingerprint"] != b.data["fingerprint"]:
        raise InputError(
            f"{names[0]!r} and {names[1]!r} were evaluated on different samples; a paired comparison needs"
            " the same ones"
        )
    shared = [norm for norm in a.curves if norm in b.curves]
    if not shared:
        raise InputError(f"the two share no norm: {', '.join(a.curves)} and {', '.join(b.curves)}")
    norms = {norm: tuple(_points(a, b, norm)) for norm in shared}
    return Comparison(names, (a, b), norms)


def _points(a: Evaluation, b: Evaluation, norm: str) -> list[ComparedPoint]:
    grid = sorted({point.epsilon for one in (a, b) for point in one.curves[norm].points})
    points = []
    for epsilon in grid:
        first, second = a.distance[norm] > epsilon, b.distance[norm] > epsilon
        points.append(
            ComparedPoint(
                epsilon,
                float(first.mean()),
                float(second.mean()),
                _interval(first),
                _interval(second),
                mcnemar(int((first & ~second).sum()), int((second & ~first).sum())),
            )
        )
    return points


def _interval(standing: NDArray) -> tuple[float, float]:
    return wilson_interval(int(np.count_nonzero(standing)), len(standing))


def _names(first: object, second: object, pair: tuple[Evaluation, ...]) -> tuple[str, str]:
    """Return their names: of the models, or of the folders if the models have the same name."""
    models = tuple(str(one.settings.get("model", "")) for one in pair)
    if models[0] and models[0] != models[1] and models[1]:
        return models[0], models[1]
    places = tuple(str(one) if isinstance(one, (str, Path)) else "" for one in (first, second))
    if places[0] and places[0] != places[1] and places[1]:
        return places[0], places[1]
    return "first", "second"
