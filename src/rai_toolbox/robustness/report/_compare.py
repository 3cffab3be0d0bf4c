"""Evaluations side by side, on the same samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import as_folder
from rai_toolbox.robustness._results import jsonable
from rai_toolbox.robustness._statistics import McNemar, mcnemar, wilson_interval
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._pictures import curve_drawing, curve_png
from rai_toolbox.robustness.report._points import with_points
from rai_toolbox.robustness.report._report import render
from rai_toolbox.robustness.report._transfer import Transfer, transfers
from rai_toolbox.robustness.report._writing import csv_text, write_files


@dataclass(frozen=True)
class ComparedPoint:
    """Models at one epsilon.

    Attributes
    ----------
    epsilon : float
        The radius.
    accuracies : tuple of float
        One for each model.
    intervals : tuple of (float, float)
        Their 95 % Wilson intervals.
    tests : tuple of McNemar
        For each model but the first: McNemar's test of it and the first.
    """

    epsilon: float
    accuracies: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    tests: tuple[McNemar, ...]

    @property
    def first(self) -> float:
        """The accuracy of the first model."""
        return self.accuracies[0]

    @property
    def second(self) -> float:
        """The accuracy of the second model."""
        return self.accuracies[1]

    @property
    def test(self) -> McNemar:
        """The test of the first two models."""
        return self.tests[0]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes
    ----------
    names : tuple of str
        The names of the models, in the order in which they were given.
    evaluations : tuple of Evaluation
        Of each.
    norms : dict of str to tuple of ComparedPoint
        By norm, at every epsilon that one of them reported.
    transfer : tuple of Transfer
        What the errors of each model do to each other one, where models were given.
    """

    names: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    norms: Mapping[str, tuple[ComparedPoint, ...]]
    transfer: tuple[Transfer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of comparison.json."""
        points = {
            norm: [vars(point) | {"tests": [vars(test) for test in point.tests]} for point in points]
            for norm, points in self.norms.items()
        }
        content = {"schema": "rai-toolbox/comparison", "schema_version": 2, "names": self.names, "norms": points}
        return jsonable(content | {"transfer": [vars(one) for one in self.transfer]})

    def by_name(self) -> dict[str, Evaluation]:
        """Return the evaluations by their names."""
        return dict(zip(self.names, self.evaluations, strict=True))

    def save(self, folder: str | Path) -> Path:
        """Write comparison.html, .png, .csv and .json, and transfer.csv if errors were tried; return the folder.

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
    tests = ["only_first", "only_second", "p_value"]
    if len(comparison.names) > 2:
        tests = [f"{what} ({name})" for name in comparison.names[1:] for what in ("only_first", "only_it", "p_value")]
    rows = [["norm", "epsilon", *comparison.names, *tests]]
    rows += [
        [norm, point.epsilon, *point.accuracies, *(value for test in point.tests for value in vars(test).values())]
        for norm, points in comparison.norms.items()
        for point in points
    ]
    return csv_text(rows)


def _transfer_csv(comparison: Comparison) -> str | None:
    rows = [["norm", "epsilon", "source", "target", "errors", "transferred"]]
    rows += [list(vars(one).values()) for one in comparison.transfer]
    return csv_text(rows) if comparison.transfer else None


#: The files of a comparison's folder.
COMPARISON_FILES: Mapping[str, Callable[[Comparison], bytes | str | None]] = {
    "comparison.html": _html,
    "comparison.png": lambda comparison: curve_png(comparison.by_name()),
    "comparison.csv": _csv,
    "transfer.csv": _transfer_csv,
    "comparison.json": lambda comparison: json.dumps(comparison.to_dict(), allow_nan=False),
}


def compare(
    first: Evaluation | str | Path, second: Evaluation | str | Path, *others: Evaluation | str | Path,
    models: Sequence[Callable[[Tensor], Any]] | None = None,
) -> Comparison:  # fmt: skip
    """Compare classifiers that were evaluated on the same samples, each with the first.

    Whether a sample stands at an epsilon is known from the distance of its nearest error, so the epsilons
    need not be the same; at those that only one of them reported, the others' fixed-budget solver has not
    been run.

    Parameters
    ----------
    first, second, *others : Evaluation or path
        The results, or the folders or results.json files that hold them.
    models : sequence of callable, optional
        The model of each, in the same order, with its preprocessing: the perturbed inputs that each evaluation has kept
        are then tried on each other model (`Comparison.transfer`). They are those of the gallery, or of all samples
        with ``keep_points=True``.

    Raises
    ------
    InputError
        If they are of different samples, have no norm in common, or are not complete classifications; if a model
        answers otherwise than when it was evaluated, or is random.
    """
    given = (first, second, *others)
    all_of_them = tuple(one if isinstance(one, Evaluation) else Evaluation.load(one) for one in given)
    names = _names(given, all_of_them)
    for name, one in zip(names, all_of_them, strict=True):
        if one.task != "classification":
            raise InputError(f"{name!r} is a regression; classifiers are compared")
        if not one.complete:
            raise InputError(f"{name!r} is a partial result; finish it with {arg('resume', True)} first")
        if one.data["fingerprint"] != all_of_them[0].data["fingerprint"]:
            raise InputError(
                f"{names[0]!r} and {name!r} were evaluated on different samples; a paired comparison needs the same"
            )
    shared = [norm for norm in all_of_them[0].curves if all(norm in one.curves for one in all_of_them)]
    if not shared:
        raise InputError(
            f"the evaluations have no norm in common: {'; '.join(', '.join(one.curves) for one in all_of_them)}"
        )
    norms = {norm: tuple(_points(all_of_them, norm)) for norm in shared}
    if models is None:
        return Comparison(names, all_of_them, norms)
    named = dict(zip(names, map(with_points, given), strict=True))
    radii = {norm: [point.epsilon for point in points if point.epsilon > 0] for norm, points in norms.items()}
    return Comparison(names, all_of_them, norms, tuple(transfers(named, models, radii)))


def _points(evaluations: Sequence[Evaluation], norm: str) -> Iterator[ComparedPoint]:
    for epsilon in sorted({point.epsilon for one in evaluations for point in one.curves[norm].points}):
        standing = [one.distance[norm] > epsilon for one in evaluations]
        first = standing[0]
        yield ComparedPoint(
            epsilon,
            tuple(float(one.mean()) for one in standing),
            tuple(wilson_interval(int(np.count_nonzero(one)), len(one)) for one in standing),
            tuple(mcnemar(int((first & ~one).sum()), int((one & ~first).sum())) for one in standing[1:]),
        )


def _names(given: Sequence[object], evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Return their names: of the models, or of the folders where models share a name, or numbers."""
    models = tuple(str(one.settings.get("model", "")) for one in evaluations)
    places = tuple(str(one) if isinstance(one, (str, Path)) else "" for one in given)
    numbered = ("first", "second", "third", *(f"number {number}" for number in range(4, len(given) + 1)))[: len(given)]
    return next(
        names
        for names in (models, places, numbered)
        if (all(names) and len(set(names)) == len(names)) or names is numbered
    )
