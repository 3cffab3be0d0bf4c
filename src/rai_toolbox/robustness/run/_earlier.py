"""Match the perturbed inputs of earlier evaluations with the samples of this one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._results import Examples
from rai_toolbox.robustness.attack._subject import EarlierPoints, Subject
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._points import with_points

#: What `evaluate` takes: an evaluation or the path of one, or several.
Earlier = Evaluation | str | Path | Sequence[Evaluation | str | Path]

# A distance that was measured again may differ by rounding.
_ROUNDING = 1e-5


def by_name(given: Earlier) -> dict[str, Evaluation | str | Path]:
    """Return earlier evaluations by their names: their paths, or their numbers."""
    several = (given,) if isinstance(given, Evaluation | str | Path) else tuple(given)
    return {
        f"evaluation {number}" if isinstance(one, Evaluation) else str(one): one
        for number, one in enumerate(several, start=1)
    }


def earlier_points(subject: Subject, given: Mapping[str, Evaluation | str | Path]) -> dict[str, EarlierPoints]:
    """Return the points of earlier evaluations by norm, each with the number that its sample has here.

    Raises InputError if one of them is of other samples, has no points in a norm of this evaluation, or not those of
    all its samples; or cannot be read.
    """
    loaded = {name: with_points(one) for name, one in given.items()}
    parts = {
        norm: [_matched(subject, name, one, norm) for name, one in loaded.items()] for norm in subject.settings.norms
    }
    return {norm: _joined(found) for norm, found in parts.items() if found}


def digest_of(earlier: Mapping[str, EarlierPoints]) -> str:
    """Return a hash of all points."""
    whole = hashlib.sha256()
    for norm, points in earlier.items():
        whole.update(norm.encode())
        for array in (points.index, points.perturbed, points.distance):
            whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:32]


def _matched(subject: Subject, name: str, one: Evaluation, norm: str) -> EarlierPoints:
    what = f"{arg('also_try')} {name!r}"
    if one.task != subject.settings.task:
        raise InputError(f"{what} is a {one.task}, this is a {subject.settings.task}")
    if tuple(one.data["shape"]) != subject.samples.shape:
        raise InputError(
            f"{what} is of samples of shape {tuple(one.data['shape'])}, the data have {subject.samples.shape}"
        )
    if norm not in one.curves:
        raise InputError(f"{what} has no points in {norm}: it was evaluated in {', '.join(one.curves)}")
    shown = one.examples.get(norm)
    _check_whole(what, one, norm, shown)
    if shown is None:
        return EarlierPoints(np.zeros(0, np.int64), np.zeros((0, *subject.samples.shape), np.float32), np.zeros(0))
    here = _numbers_here(subject, one, shown)
    there = here >= 0
    here = here[there]
    _check_same(subject, what, one, here, shown, there)
    return EarlierPoints(here, shown.perturbed[there], shown.distance[there].astype(np.float64))


def _numbers_here(subject: Subject, one: Evaluation, shown: Examples) -> NDArray:
    """Return the number that the sample of each point has here, by its id where both have ids; -1 for none."""
    if one.ids is None or subject.samples.ids is None:
        return np.where(shown.index < len(subject.samples), shown.index, -1)
    here = {name: number for number, name in enumerate(subject.samples.ids)}
    ids = dict(zip(one.index.tolist(), one.ids, strict=True))
    return np.array([here.get(ids[index], -1) for index in shown.index.tolist()], dtype=np.int64)


def _joined(parts: list[EarlierPoints]) -> EarlierPoints:
    index, perturbed, distance = zip(*((part.index, part.perturbed, part.distance) for part in parts), strict=True)
    return EarlierPoints(np.concatenate(index), np.concatenate(perturbed), np.concatenate(distance))


def _check_same(subject: Subject, what: str, one: Evaluation, here: NDArray, shown: Examples, there: NDArray) -> None:
    """See that each unperturbed input is the one that it is here."""
    if not len(here) and len(shown.index):
        raise InputError(f"{what} has none of the samples of the data")
    originals = shown.original[there]
    for number, original in zip(here.tolist(), originals, strict=True):
        mine = subject.samples.inputs(number, number + 1).numpy()[0]
        if not np.array_equal(mine.astype(original.dtype), original):
            raise InputError(f"{what} is of other samples: its input of sample {number} is not that of the data")


def _check_whole(what: str, one: Evaluation, norm: str, shown: Examples | None) -> None:
    """See that there is a point for each error found, as near as it was: without them a rerun might find less."""
    if one.task == "regression":
        lacking = 0 if one.settings.get("keep_points") else len(one.index)
    else:
        nearest = dict.fromkeys(one.index.tolist(), np.inf)
        if shown is not None:
            for index, distance in zip(shown.index.tolist(), shown.distance.tolist(), strict=True):
                nearest[index] = min(nearest[index], distance)
        kept = np.array([nearest[index] for index in one.index.tolist()])
        found = one.distance[norm]
        lacking = int(((found > 0) & np.isfinite(found) & ~(kept <= found * (1 + _ROUNDING))).sum())
    if lacking:
        raise InputError(
            f"{what} has not kept the points of {lacking} of its {len(one.index)} samples in {norm}: evaluate it with"
            f" {arg('keep_points', True)}, which keeps those of all"
        )
