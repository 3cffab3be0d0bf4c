"""The perturbed inputs of a batch that are kept: those that the gallery may show, or on request all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.robustness.attack._solver import CheckedResult, as_numpy
from rai_toolbox.robustness.attack._subject import Subject

_PARTS = ("index", "level", "input", "distance", "prediction")


class Kept:
    """Perturbed inputs of a batch, one for a sample and level; a later one takes the place of an earlier.

    start, stop: the first sample of the batch and the one after its last.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        self.start, self.stop = subject.span(batch)
        self._rows = {index - self.start for index in range(self.start, self.stop) if index in subject.shown}
        self._found: dict[tuple[int, int], tuple[NDArray, float, NDArray]] = {}

    def take(
        self, rows: NDArray, found: CheckedResult, chosen: NDArray | slice = slice(None), *, level: int = 0
    ) -> None:
        """Take in what was found for some rows of the batch.

        rows: of `found`, which rows its entries are of; those of infinite distance are passed over.
        chosen: which entries, as a mask or as positions; the last of several for a row is kept.
        level: of a regression, the position of the radius.
        """
        for row, position in zip(rows[chosen].tolist(), np.arange(len(rows))[chosen].tolist(), strict=True):
            if row in self._rows and np.isfinite(found.distance[position]):
                point = found.perturbed[position]
                # numpy has no bfloat16, and float32 holds all of it.
                point = as_numpy(point if point.dtype == torch.float64 else point.float())
                self._found[row, level] = point, float(found.distance[position]), found.prediction[position]

    def restore(self, arrays: Mapping[str, NDArray]) -> None:
        """Take back what `arrays` has returned."""
        if "shown_index" in arrays:
            values = (arrays[f"shown_{name}"] for name in _PARTS)
            self._found = {
                (int(index) - self.start, int(level)): (perturbed, float(distance), prediction)
                for index, level, perturbed, distance, prediction in zip(*values, strict=True)
            }

    def arrays(self) -> Mapping[str, NDArray]:
        """Return all as arrays, for a piece."""
        if not self._found:
            return {}
        places = sorted(self._found)
        perturbed, distance, prediction = zip(*(self._found[place] for place in places), strict=True)
        rows, levels = np.array(places).T
        values = (rows + self.start, levels, np.stack(perturbed), np.array(distance), np.array(prediction))
        return {f"shown_{name}": value for name, value in zip(_PARTS, values, strict=True)}
