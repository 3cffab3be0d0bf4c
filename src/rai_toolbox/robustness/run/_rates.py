"""Of a random model: how probable an error is at the worst point of each sample that is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness.attack._average import RANDOM_POINT
from rai_toolbox.robustness.attack._solver import interval_of_errors
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.run._assembly import Measured, Pieces


def error_rates(subject: Subject, clean: Pieces, measured: Measured) -> NDArray:
    """Return, at each point of the curve and for each sample, the rate of errors and the ends of its interval.

    Shape (points, samples, 3). A sample that stands at a radius has the rate at the worst point that was found within
    it; one that does not, that at the error that broke it. NaN where a time limit came before.
    """
    radii, draws = [point.epsilon for point in measured.curve.points], subject.settings.draws
    rates = np.full((len(radii), len(subject.samples), 3), np.nan)
    for batch in range(subject.batches):
        start, stop = subject.span(batch)
        first = clean[batch]
        if first is None or np.isnan(measured.outcome[start]):
            continue
        errors = _errors(radii, batch, slice(start, stop), first["errors"], measured)
        low, high = interval_of_errors(np.maximum(errors, 0), draws)
        found = np.stack([errors / draws, low, high], axis=-1)
        rates[:, start:stop] = np.where(errors[..., None] < 0, np.nan, found)
    return rates


def _errors(radii: list[float], batch: int, samples: slice, clean: NDArray, measured: Measured) -> NDArray:
    """Return the counts of errors of a batch at each radius; -1 where there is none."""
    errors = np.full((len(radii), len(clean)), -1)
    errors[0] = clean
    wrong = measured.outcome[samples] == 0
    errors[:, wrong] = clean[wrong]
    # In the order in which they were made.
    made = ((name, pieces[batch]) for name, pieces in measured.stages.items())
    for name, piece in made:
        if piece is None:
            continue
        if name == "confirm":
            errors[1:] = np.where(piece["errors_tried"] >= 0, piece["errors_tried"], errors[1:])
        found = measured.by[samples] == RANDOM_POINT if name == "average" else piece["by"] != ""
        within = found & (piece["distance"] <= np.array(radii)[:, None])
        errors = np.where(within, piece["errors"], errors)
    return errors
