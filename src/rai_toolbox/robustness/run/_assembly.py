"""From finished pieces to the result."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox._version import __version__
from rai_toolbox.robustness._results import Curve, Examples, Finding
from rai_toolbox.robustness.attack._stages import Bench
from rai_toolbox.robustness.data._samples import Summary
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.session._journal import Piece

__all__ = ["Measured", "assemble", "class_names", "joined", "reached", "scattered", "total"]

Pieces = Sequence[Piece | None]


@dataclass(frozen=True)
class Measured:
    """What was found in one norm.

    Attributes
    ----------
    curve : Curve
        Over the samples that were reached.
    outcome : NDArray
        Of every sample, NaN where it was not reached: the distance of its nearest error, shape (N,); or its error at
        each point of the curve, shape (points, N).
    stages : dict of str to sequence of Piece or None
        The pieces that this comes from, batch by batch, by stage.
    """

    curve: Curve
    outcome: NDArray
    stages: Mapping[str, Pieces]


def joined(pieces: Pieces, name: str) -> NDArray:
    """Return one array of all pieces that are there, end to end."""
    arrays = [piece[name] for piece in pieces if piece is not None]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def reached(bench: Bench, pieces: Pieces) -> NDArray:
    """Return the indices of the samples whose batches are among the pieces."""
    spans = [bench.span(batch) for batch, piece in enumerate(pieces) if piece is not None]
    return np.concatenate([np.arange(*span) for span in spans]) if spans else np.zeros(0, dtype=np.int64)


def scattered(values: NDArray, where: NDArray, count: int) -> NDArray:
    """Return an array with the values at the indices `where` of its last dimension, NaN elsewhere."""
    full = np.full((*values.shape[:-1], count), np.nan)
    full[..., where] = values
    return full


def total(name: str, pieces: Iterable[Piece | None]) -> float:
    """Return the sum of a number that every piece holds."""
    return sum(float(piece[name]) for piece in pieces if piece is not None)


def class_names(bench: Bench) -> tuple[str, ...]:
    """Return what to call the classes: the number of one that has no name."""
    if not bench.classifies:
        return ()
    names = bench.samples.class_names or ()
    count = max(int(bench.targets.max()) + 1, len(names))
    return tuple(names[label] if label < len(names) else str(label) for label in range(count))


def assemble(
    bench: Bench,
    summary: Summary,
    looked: Pieces,
    measured: Mapping[str, Measured],
    findings: tuple[Finding, ...],
    *,
    complete: bool,
    described: Mapping[str, Any],
    seconds: float,
    processes: int,
) -> Evaluation:
    """Return the result.

    Parameters
    ----------
    looked : sequence of Piece or None
        What the model says to the unperturbed samples.
    measured : dict of str to Measured
        By norm.
    """
    where = reached(bench, looked)
    distance, error = (
        {norm: one.outcome[..., where] for norm, one in measured.items() if bench.classifies is classification}
        for classification in (True, False)
    )
    examples = {norm: _examples(bench, one.stages.values()) for norm, one in measured.items()}
    return Evaluation(
        task=bench.settings.task,
        complete=complete,
        curves={norm: one.curve for norm, one in measured.items()},
        findings=findings,
        index=where,
        label=bench.targets[where],
        prediction=joined(looked, "prediction"),
        correct=joined(looked, "correct") if bench.classifies else np.zeros(0, dtype=bool),
        distance=distance,
        error=error,
        class_names=class_names(bench),
        settings=bench.settings.to_dict() | {"bounds": bench.box.to_dict(), "device": bench.device.type, **described},
        data={
            "samples": len(bench.samples),
            "evaluated": len(where),
            "shape": list(bench.samples.shape),
            "minimum": summary.minimum,
            "maximum": summary.maximum,
            "fingerprint": summary.fingerprint,
        },
        environment=_environment(bench, processes),
        timings={"total": seconds}
        | {
            f"{stage}_{norm}": total("seconds", pieces)
            for norm, one in measured.items()
            for stage, pieces in one.stages.items()
        },
        examples={norm: shown for norm, shown in examples.items() if shown is not None},
        feature_names=bench.samples.feature_names,
    )


def _examples(bench: Bench, stages: Iterable[Pieces]) -> Examples | None:
    # A later stage found something nearer than an earlier one.
    kept: dict[int, tuple[NDArray, float, Any]] = {}
    for piece in (piece for pieces in stages for piece in pieces if piece is not None and "shown_index" in piece):
        rows = zip(piece["shown_input"], piece["shown_distance"].tolist(), piece["shown_prediction"], strict=True)
        kept |= dict(zip(piece["shown_index"].tolist(), rows, strict=True))
    if not kept:
        return None
    order = sorted(kept, key=lambda index: (kept[index][1], index))
    perturbed, distance, prediction = zip(*(kept[index] for index in order), strict=True)
    return Examples(
        index=np.array(order),
        original=bench.samples.gather(order).numpy(),
        perturbed=np.stack(perturbed),
        distance=np.array(distance),
        prediction=np.array(prediction),
    )


def _environment(bench: Bench, processes: int) -> dict[str, Any]:
    device = bench.device
    return {
        "rai_toolbox": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
