"""The files of an evaluation's folder: a table from name to writer."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rai_toolbox.robustness._files import claimed, write_together
from rai_toolbox.robustness._results import Point, Results
from rai_toolbox.robustness._text import shortened
from rai_toolbox.robustness.report._card import render_card
from rai_toolbox.robustness.report._pictures import curve_png
from rai_toolbox.robustness.report._report import render_report
from rai_toolbox.robustness.report._schema import to_json

T = TypeVar("T")

# How many letters of a class's name a table has; results.json has all.
_NAME = 200


def write_files(folder: Path, writers: Mapping[str, Callable[[T], bytes | str | None]], result: T) -> Path:
    """Write a file per writer, in their order; a writer that returns None has none, and that of an earlier result goes.

    Every content is made before the first file is written: a result that cannot be drawn leaves no half a report.
    """
    contents = {name: write(result) for name, write in writers.items()}
    written = {
        name: content.encode("utf-8") if isinstance(content, str) else content for name, content in contents.items()
    }
    with claimed(folder, writers):
        write_together(folder, written)
    return folder


def _curve_csv(evaluation: Results) -> str:
    """Return every point of every curve as CSV."""
    measure = evaluation.measure.replace(" ", "_")
    names = [measure if field.name == "value" else field.name for field in dataclasses.fields(Point)]
    rows = [["norm", *names, "average_error", "average_low", "average_high", "average_points"]]
    rows += [
        [
            norm,
            *vars(p).values(),
            *((mean.error, mean.low, mean.high, mean.points) if mean is not None else (None,) * 4),
        ]
        for norm, curve in evaluation.curves.items()
        for p, mean in itertools.zip_longest(curve.points, curve.average)
    ]
    return csv_text(rows)


def _classes_csv(evaluation: Results) -> str | None:
    if evaluation.task != "classification":
        return None
    rows = [["norm", "label", "class", "samples", "epsilon", "accuracy"]]
    rows += [
        [norm, row.label, shortened(row.name, _NAME), row.samples, point.epsilon, value]
        for norm, curve in evaluation.curves.items()
        for row in curve.classes
        for point, value in zip(curve.points, row.values, strict=True)
    ]
    return csv_text(rows)


def _corruptions_csv(evaluation: Results) -> str | None:
    if not evaluation.corruptions:
        return None
    rows = [["corruption", "severity", evaluation.measure.replace(" ", "_"), "low", "high", "samples"]]
    rows += [
        [name, *vars(point).values()]
        for name, corruption in evaluation.corruptions.items()
        for point in corruption.points
    ]
    return csv_text(rows)


def _samples_csv(evaluation: Results) -> str:
    columns = {
        name: np.array([shortened(one, _NAME) for one in values], dtype=object)
        if name in ("label_name", "prediction_name")
        else values
        for name, values in evaluation.columns().items()
    }
    return csv_text([list(columns), *zip(*(values.tolist() for values in columns.values()), strict=True)])


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV; numbers in full, and no text that a spreadsheet would take for a formula."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Return a cell as it is, but for an apostrophe before a text that begins as formulas do."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _examples_npz(evaluation: Results) -> bytes:
    arrays = {
        f"{norm}_{name}": values
        for norm, examples in evaluation.examples.items()
        for name, values in vars(examples).items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


#: The files of an evaluation's folder. results.json comes last: where it is, the others are.
EVALUATION_FILES: Mapping[str, Callable[[Results], bytes | str | None]] = {
    "report.html": render_report,
    "card.md": render_card,
    "curve.png": lambda evaluation: curve_png({"": evaluation}),
    "curve.csv": _curve_csv,
    "classes.csv": _classes_csv,
    "corruptions.csv": _corruptions_csv,
    "samples.csv": _samples_csv,
    "examples.npz": _examples_npz,
    "results.json": to_json,
}
