"""Read the perturbed inputs that an evaluation has kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._results import Examples
from rai_toolbox.robustness.data._npz import NpzArchive
from rai_toolbox.robustness.report._evaluation import Evaluation


def with_points(one: Evaluation | str | Path) -> Evaluation:
    """Return an evaluation with its perturbed inputs; those of a folder, or of the one beside a results.json, are read.

    Raises InputError if there is no evaluation, its examples.npz cannot be read, or is of another one.
    """
    if isinstance(one, Evaluation):
        return one
    path = Path(one)
    evaluation = Evaluation.load(path)
    file = (path if path.is_dir() else path.parent) / "examples.npz"
    return replace(evaluation, examples=_read(file, evaluation))


def _read(file: Path, evaluation: Evaluation) -> Mapping[str, Examples]:
    archive = NpzArchive(file)
    examples = {}
    for norm in evaluation.curves:
        names = [entry.name for entry in fields(Examples)]
        if f"{norm}_index" not in archive:
            continue
        missing = [name for name in names if f"{norm}_{name}" not in archive]
        if missing:
            raise InputError(f"{str(file)!r} is damaged: it has no array {norm}_{missing[0]}")
        shown = Examples(**{name: archive.array(f"{norm}_{name}") for name in names})
        _check(file, norm, shown, evaluation)
        examples[norm] = shown
    return examples


def _check(file: Path, norm: str, shown: Examples, evaluation: Evaluation) -> None:
    count, shape = len(shown.index), tuple(evaluation.data["shape"])
    forms = {"original": (count, *shape), "perturbed": (count, *shape), "distance": (count,), "index": (count,)}
    for name, form in forms.items():
        array = getattr(shown, name)
        if array.shape != form or array.dtype.kind not in ("iu" if name == "index" else "f"):
            raise InputError(f"{str(file)!r} is damaged: {norm}_{name} has shape {array.shape} and dtype {array.dtype}")
        if not np.isfinite(array).all():
            raise InputError(f"{str(file)!r} is damaged: {norm}_{name} has an entry that is no finite number")
    if not np.isin(shown.index, evaluation.index).all():
        raise InputError(f"{str(file)!r} has a sample that its results.json has not: it is of another evaluation")
