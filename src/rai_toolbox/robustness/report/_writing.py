"""The files of a report's folder: all of them, each whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rai_toolbox.robustness._files import atomic_write, prepare_folder, write_text
from rai_toolbox.robustness._results import Results
from rai_toolbox.robustness.report._pictures import plot_curves
from rai_toolbox.robustness.report._report import render_report
from rai_toolbox.robustness.report._schema import to_json

__all__ = ["FILES", "csv_text", "write_results"]

FILES = ("report.html", "curve.png", "curve.csv", "classes.csv", "samples.csv", "examples.npz", "results.json")


def write_results(evaluation: Results, folder: Path) -> Path:
    """Write the files of an evaluation; results.json comes last, so that where it is the others are."""
    prepare_folder(folder)
    # All is made before the first is written: what cannot be drawn leaves no half a report.
    report = render_report(evaluation)
    figure = plot_curves({"": evaluation})
    write_text(folder / "report.html", report)
    with atomic_write(folder / "curve.png") as file:
        figure.savefig(file, format="png", dpi=160)
    write_text(folder / "curve.csv", _curve_csv(evaluation))
    if evaluation.task == "classification":
        write_text(folder / "classes.csv", _classes_csv(evaluation))
    write_text(folder / "samples.csv", _samples_csv(evaluation))
    with atomic_write(folder / "examples.npz") as file:
        np.savez_compressed(file, **_examples(evaluation))  # type: ignore[arg-type]
    write_text(folder / "results.json", to_json(evaluation))
    return folder


def _curve_csv(evaluation: Results) -> str:
    """Return every point of every curve as CSV."""
    measure = evaluation.measure.replace(" ", "_")
    rows = [["norm", "epsilon", measure, "low", "high", "samples", "by_minimum_norm", "also_by_fixed_budget"]]
    rows += [
        [norm, p.epsilon, p.value, p.low, p.high, p.samples, p.by_minimum_norm, p.also_by_fixed_budget]
        for norm, curve in evaluation.curves.items()
        for p in curve.points
    ]
    return csv_text(rows)


def _classes_csv(evaluation: Results) -> str:
    rows = [["norm", "label", "class", "samples", "epsilon", "accuracy"]]
    rows += [
        [norm, row.label, row.name, row.samples, point.epsilon, value]
        for norm, curve in evaluation.curves.items()
        for row in curve.classes
        for point, value in zip(curve.points, row.values, strict=True)
    ]
    return csv_text(rows)


def _samples_csv(evaluation: Results) -> str:
    columns = evaluation.columns()
    return csv_text([list(columns), *zip(*(values.tolist() for values in columns.values()), strict=True)])


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV; numbers in full."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _examples(evaluation: Results) -> dict[str, Any]:
    arrays = {}
    for norm, examples in evaluation.examples.items():
        arrays |= {f"{norm}_{name}": values for name, values in vars(examples).items()}
    return arrays
