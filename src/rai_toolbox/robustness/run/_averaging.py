"""The average beside the worst case, and corruptions: the stages that draw at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._evidence import Corruption
from rai_toolbox.robustness._results import Curve
from rai_toolbox.robustness.attack._average import RANDOM_POINT, average, can_be_drawn
from rai_toolbox.robustness.attack._corruptions import corrupted
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import NAME
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.run._assembly import (
    Measured,
    Pieces,
    after_earlier,
    class_names,
    joined,
    reached,
    scattered,
    total,
)
from rai_toolbox.robustness.run._curves import accuracy_curve, average_of, corruption_of, error_curve

#: Does the work of a stage for every batch, as `Run` does.
Stage = Callable[[str, str, Callable[[int], Mapping[str, Any] | None]], Pieces]


def with_average(subject: Subject, norm: Norm, measured: Measured, stage: Stage) -> Measured:
    """Return what was found in a norm with the average beside it, where random points can be drawn.

    A sample does not stand where a random point is misclassified, whatever the attacks say: no figure of the average
    may be worse than that of the worst case.
    """
    if not subject.settings.average or not can_be_drawn(subject, norm):
        return measured
    grid = tuple(point.epsilon for point in measured.curve.points[1:])

    def average_batch(batch: int) -> Mapping[str, Any] | None:
        known = measured.outcome[..., slice(*subject.span(batch))]
        return None if np.isnan(known[..., 0]).any() else average(subject, norm, batch, grid, known)

    pieces = stage(f"average-{norm}", f"Drawing random points ({norm})", average_batch)
    return _joined(subject, norm, measured, pieces, grid) if any(pieces) else measured


def corruptions_of(subject: Subject, clean: Pieces, stage: Stage) -> dict[str, tuple[Corruption, Pieces]]:
    """Return the model's curve under each corruption and the pieces that it comes from.

    clean: the model's outputs on the unperturbed samples, by batch.
    """
    measured = {}
    severities = subject.settings.severities
    for position, name in enumerate(subject.settings.corruptions):

        def corrupt_batch(batch: int, name: str = name) -> Mapping[str, Any] | None:
            return None if clean[batch] is None else corrupted(subject, name, batch, severities)

        pieces = stage(f"corruption-{position}", f"Corrupting the samples ({name})", corrupt_batch)
        if any(pieces):
            first = [one if two is not None else None for one, two in zip(clean, pieces, strict=True)]
            unperturbed = 1.0 - joined(first, "correct") if subject.classifies else joined(first, "error")
            error = np.concatenate([piece["error"] for piece in pieces if piece is not None], axis=1)
            curve = corruption_of(name, severities, unperturbed, error, classifies=subject.classifies)
            measured[name] = curve, pieces
    return measured


def _joined(subject: Subject, norm: Norm, measured: Measured, pieces: Pieces, grid: tuple[float, ...]) -> Measured:
    where, before = reached(subject, pieces), measured.outcome
    error, largest = (
        np.concatenate([piece[name] for piece in pieces if piece is not None], axis=1) for name in ("error", "largest")
    )
    clamped = np.sum([piece["clamped"] for piece in pieces if piece is not None], axis=0)
    forwards = total("forwards", pieces)
    if subject.classifies:
        unperturbed = (before[where] == 0).astype(np.float64)
        found = scattered(joined(pieces, "distance"), where, len(subject.samples))
        worse = found < before
        outcome = np.where(worse, found, before)
        curve = _accuracies(subject, norm, grid, measured, outcome, forwards)
    else:
        unperturbed = before[0, where]
        # A larger radius allows every change that a smaller one does.
        found = np.maximum.accumulate(np.vstack([unperturbed, largest]), axis=0)
        found = scattered(found, where, len(subject.samples))
        worse = found > before
        outcome = np.where(worse, found, before)
        done = outcome[:, ~np.isnan(outcome).any(axis=0)]
        spent = measured.curve.forwards_per_sample * done.shape[1] + forwards
        curve = error_curve(norm, grid, done, spent, measured.curve.confirmed)
    draws, counts = subject.settings.average, subject.classifies
    curve = replace(curve, average=average_of(grid, unperturbed, error, clamped, draws, counts=counts))
    by = np.where(worse, RANDOM_POINT, measured.by).astype(NAME)
    return Measured(curve, outcome, {**measured.stages, "average": pieces}, by, measured.by_solvers)


def _accuracies(
    subject: Subject, norm: Norm, grid: tuple[float, ...], measured: Measured, outcome: NDArray, forwards: float
) -> Curve:
    where = reached(subject, measured.stages["search"])
    by_solvers = measured.outcome if measured.by_solvers is None else measured.by_solvers
    return accuracy_curve(
        norm, grid, outcome[where], joined(measured.stages["search"], "distance"), subject.targets[where],
        class_names(subject), by_earlier=after_earlier(measured.stages), by_solvers=by_solvers[where],
        confirmed=measured.curve.confirmed,
        forwards=forwards + measured.curve.forwards_per_sample * len(where),
    )  # fmt: skip
