"""The files of a report's folder: all of them, each whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ._files import atomic_write, prepare_folder, write_text
from ._results import Evaluation

__all__ = ["FILES", "curve_csv", "write_results"]

FILES = ("report.html", "curve.png", "curve.csv", "samples.csv", "examples.npz", "results.json")


def write_results(evaluation: Evaluation, folder: Path) -> Path:
    """Write the files of an evaluation; results.json comes last, so that where it is the others are."""
    from ._report import render_report

    prepare_folder(folder)
    # All is made before the first is written: what cannot be drawn leaves no half a report.
    report = render_report(evaluation)
    figure = evaluation.plot()
    write_text(folder / "report.html", report)
    with atomic_write(folder / "curve.png") as file:
        figure.savefig(file, format="png", dpi=160)
    write_text(folder / "curve.csv", curve_csv(evaluation))
    write_text(folder / "samples.csv", _samples_csv(evaluation))
    with atomic_write(folder / "examples.npz") as file:
        np.savez_compressed(file, **_examples(evaluation))  # type: ignore[arg-type]
    write_text(folder / "results.json", evaluation.to_json())
    return folder


def curve_csv(evaluation: Evaluation) -> str:
    """Return every point of every curve as CSV."""

    def rows(write: Callable[[list[Any]], Any]) -> None:
        write(
            [
                "norm",
                "epsilon",
                evaluation.measure.replace(" ", "_"),
                "low",
                "high",
                "samples",
                "by_minimum_norm",
                "also_by_fixed_budget",
            ]
        )
        for norm, curve in evaluation.curves.items():
            for point in curve.points:
                write(
                    [
                        norm,
                        point.epsilon,
                        point.value,
                        point.low,
                        point.high,
                        point.samples,
                        point.by_minimum_norm,
                        point.also_by_fixed_budget,
                    ]
                )

    return _csv(rows)


def _samples_csv(evaluation: Evaluation) -> str:
    columns = evaluation.columns()

    def rows(write: Callable[[list[Any]], Any]) -> None:
        write(list(columns))
        for row in zip(*(values.tolist() for values in columns.values()), strict=True):
            write(list(row))

    return _csv(rows)


def _csv(rows: Callable[[Callable[[list[Any]], Any]], None]) -> str:
    buffer = io.StringIO(newline="")
    rows(csv.writer(buffer, lineterminator="\n").writerow)
    return buffer.getvalue()


def _examples(evaluation: Evaluation) -> dict[str, Any]:
    arrays = {}
    for norm, examples in evaluation.examples.items():
        arrays |= {f"{norm}_{name}": values for name, values in vars(examples).items()}
    return arrays
