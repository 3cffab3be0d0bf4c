"""From finished pieces to the result."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox._version import __version__
from rai_toolbox.kernels._machine import kind_of, name_of
from rai_toolbox.robustness._evidence import Corruption
from rai_toolbox.robustness._results import Curve, Examples, Finding
from rai_toolbox.robustness.attack._solver import NAME
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.data._samples import Summary
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.session._journal import Piece

Pieces = Sequence[Piece | None]


@dataclass(frozen=True)
class Measured:
    """What was found in one norm."""

    curve: Curve  # over the samples that were reached
    # Of every sample, NaN where it was not reached: the distance of its nearest error, shape (N,); or its error at each
    # point of the curve, shape (points, N).
    outcome: NDArray
    stages: Mapping[str, Pieces]  # the pieces that this comes from, batch by batch, by stage
    # Which attack found it, in its shape; empty where it is of the unperturbed sample, and where nothing was found.
    by: NDArray
    by_solvers: NDArray | None = None  # the outcome before stronger attacks, where these have been run


def joined(pieces: Pieces, name: str) -> NDArray:
    """Return one array of all pieces that are there, end to end."""
    arrays = [piece[name] for piece in pieces if piece is not None]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def reached(subject: Subject, pieces: Pieces) -> NDArray:
    """Return the indices of the samples whose batches are among the pieces."""
    spans = [subject.span(batch) for batch, piece in enumerate(pieces) if piece is not None]
    return np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, dtype=np.int64)


def after_earlier(stages: Mapping[str, Pieces]) -> NDArray | None:
    """Return the nearest errors that the search and the points of earlier evaluations found; None without such."""
    if "also_try" not in stages:
        return None
    pairs = zip(stages["search"], stages["also_try"], strict=True)
    return joined([second or first for first, second in pairs], "distance")


def attacks_of(*stages: Pieces) -> NDArray:
    """Return which attack found what the last of some stages knows of each sample."""
    parts = []
    for pieces in zip(*stages, strict=True):
        names = [piece["by"] for piece in pieces if piece is not None]
        parts += [reduce(lambda first, later: np.where(later != "", later, first), names)] if names else []
    return np.concatenate(parts)


def worst_errors(unperturbed: NDArray, *pieces: Piece | None) -> tuple[NDArray, NDArray]:
    """Return the largest error of each sample at epsilon 0 and at each radius, and which attack found it.

    The unperturbed input is in every ball, and a larger radius allows every change that a smaller one does.
    """
    there = [piece for piece in pieces if piece is not None]
    levels = len(there[0]["error"])
    error = np.repeat(unperturbed[None], levels + 1, axis=0)
    by = np.full(error.shape, "", NAME)
    for piece in there:
        for level in range(levels):
            for found, names in ((piece["error"][level], piece["by"][level]), (error[level], by[level])):
                more = found > error[level + 1]
                error[level + 1, more], by[level + 1, more] = found[more], names[more]
    return error, by


def scattered(values: NDArray, where: NDArray, count: int) -> NDArray:
    """Return an array with the values at the indices `where` of its last dimension; NaN or no name elsewhere."""
    shape = (*values.shape[:-1], count)
    full = np.full(shape, "", values.dtype) if values.dtype.kind == "U" else np.full(shape, np.nan)
    full[..., where] = values
    return full


def total(name: str, pieces: Iterable[Piece | None]) -> float:
    """Return the sum of a number that every piece holds."""
    return sum(float(piece[name]) for piece in pieces if piece is not None)


def class_names(subject: Subject) -> tuple[str, ...]:
    """Return the names of the classes; a class without one has its number."""
    if not subject.classifies:
        return ()
    names = subject.samples.class_names or ()
    count = max(int(subject.targets.max()) + 1, len(names))
    return tuple(names[label] if label < len(names) else str(label) for label in range(count))


def assemble(
    subject: Subject,
    summary: Summary,
    clean_pieces: Pieces,
    by_norm: Mapping[str, Measured],
    findings: tuple[Finding, ...],
    corruptions: Mapping[str, tuple[Corruption, Pieces]],
    rates: Mapping[str, NDArray],
    *,
    complete: bool,
    described: Mapping[str, Any],
    seconds: float,
    processes: int,
) -> Evaluation:
    """Return the result.

    clean_pieces: the model's outputs on the unperturbed samples, by batch.
    by_norm: by norm.
    corruptions: by the name of the corruption.
    """
    where = reached(subject, clean_pieces)
    distance, error = (
        {
            norm: measured.outcome[..., where]
            for norm, measured in by_norm.items()
            if subject.classifies is classification
        }
        for classification in (True, False)
    )
    examples = {norm: _examples(subject, measured.stages.values()) for norm, measured in by_norm.items()}
    return Evaluation(
        task=subject.settings.task,
        complete=complete,
        curves={norm: measured.curve for norm, measured in by_norm.items()},
        findings=findings,
        index=where,
        label=subject.targets[where],
        prediction=joined(clean_pieces, "prediction"),
        correct=joined(clean_pieces, "correct") if subject.classifies else np.zeros(0, dtype=bool),
        distance=distance,
        error=error,
        class_names=class_names(subject),
        settings=_settings(subject) | dict(described),
        data={
            "samples": len(subject.samples),
            "evaluated": len(where),
            "shape": list(subject.samples.shape),
            "minimum": summary.minimum,
            "maximum": summary.maximum,
            "fingerprint": summary.fingerprint,
        },
        environment=_environment(subject, processes),
        timings={"total": seconds}
        | {
            f"{stage}_{norm}": total("seconds", pieces)
            for norm, measured in by_norm.items()
            for stage, pieces in measured.stages.items()
        }
        | ({"corruptions": sum(total("seconds", pieces) for _, pieces in corruptions.values())} if corruptions else {}),
        examples={norm: shown for norm, shown in examples.items() if shown is not None},
        feature_names=subject.samples.feature_names,
        corruptions={name: measured for name, (measured, _) in corruptions.items()},
        error_rate={norm: values[:, where] for norm, values in rates.items()},
        found_by={norm: measured.by[..., where] for norm, measured in by_norm.items()},
        ids=None if subject.samples.ids is None else tuple(subject.samples.ids[i] for i in where.tolist()),
    )


def _settings(subject: Subject) -> dict[str, Any]:
    found = {"gradient": subject.has_gradient, "bounds": subject.box.to_dict(), "device": kind_of(subject.device)}
    return subject.settings.to_dict() | found


def _examples(subject: Subject, stages: Iterable[Pieces]) -> Examples | None:
    kept: dict[tuple[int, int], tuple[NDArray, float, Any]] = {}
    for piece in (piece for pieces in stages for piece in pieces if piece is not None and "shown_index" in piece):
        places = zip(piece["shown_index"].tolist(), piece["shown_level"].tolist(), strict=True)
        rows = zip(piece["shown_input"], piece["shown_distance"].tolist(), piece["shown_prediction"], strict=True)
        for place, row in zip(places, rows, strict=True):
            if place not in kept or _gain(subject, place[0], row) >= _gain(subject, place[0], kept[place]):
                kept[place] = row
    if not kept:
        return None
    places = sorted(kept, key=lambda place: (kept[place][1], place))
    order = [index for index, _ in places]
    perturbed, distance, prediction = zip(*(kept[place] for place in places), strict=True)
    return Examples(
        index=np.array(order),
        original=subject.samples.gather(order).numpy(),
        perturbed=np.stack(perturbed),
        distance=np.array(distance),
        prediction=np.array(prediction),
    )


def _gain(subject: Subject, index: int, row: tuple[NDArray, float, Any]) -> float:
    """Return how much a perturbed input is worth: the nearer the error or, in a regression, the larger."""
    return -row[1] if subject.classifies else float(np.abs(row[2] - subject.targets[index]).mean())


def _environment(subject: Subject, processes: int) -> dict[str, Any]:
    device = subject.device
    return {
        "rai_toolbox": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
