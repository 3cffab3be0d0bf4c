"""Kinds of evidence: what a figure shows, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attack", "average"]


@dataclass(frozen=True)
class Evidence:
    """What some figures of a result are evidence of.

    Attributes
    ----------
    figures : str
        Which ones, as a path in results.json.
    kind : {"attack", "average"}
        ``"attack"``: an attack looked for the worst perturbation (empirical). ``"average"``: random inputs were drawn
        (statistical). None is a proof (formal).
    gives : {"upper bound", "lower bound", "interval"}
        On what the figures stand for: an attack bounds the robust accuracy from above, or the worst error from below.
    meaning : str
        The same in one sentence.
    """

    figures: str
    kind: Kind
    gives: Literal["upper bound", "lower bound", "interval"]
    meaning: str


@dataclass(frozen=True)
class AveragePoint:
    """The model at random points of a ball, around every sample.

    Attributes
    ----------
    epsilon : float
        The radius; 0 is the unperturbed data.
    error : float
        The share of the points at which the model errs, or for a regression its mean absolute error there.
    low, high : float
        The ends of its 95 % interval: exact (Clopper-Pearson) for a share, normal for a mean.
    points : int
        How many random points it is of.
    clamped : int
        How many of them had to be clamped to the bounds: no point drawn from the ball lay within.
    """

    epsilon: float
    error: float
    low: float
    high: float
    points: int
    clamped: int = 0


@dataclass(frozen=True)
class CorruptionPoint:
    """The model on the samples, corrupted.

    Attributes
    ----------
    severity : float
        As it was given to the corruption; 0 is the unperturbed data.
    value : float
        The accuracy, or for a regression the mean absolute error.
    low, high : float
        The ends of its 95 % interval: exact (Clopper-Pearson) for an accuracy, normal for an error.
    samples : int
        How many samples it is of.
    """

    severity: float
    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Corruption:
    """Accuracy (or error) against the severity of one corruption.

    Attributes
    ----------
    name : str
        Of the function.
    points : tuple of CorruptionPoint
        By severity, ascending; the first is severity 0.
    """

    name: str
    points: tuple[CorruptionPoint, ...]


def evidence_of(
    *, accuracy: bool, average: bool, corruptions: Mapping[str, Corruption], queries: int | None = None
) -> tuple[Evidence, ...]:
    """Return what the figures of a result are evidence of.

    accuracy: whether the curves are accuracies.
    average: whether a curve has its average beside it.
    corruptions: the corruptions that were tried.
    queries: how often the model was asked per sample and norm, at most, if it has no gradient.
    """
    worst = (
        "An empirical upper bound on the robust accuracy: every sample counted as wrong has an error that was found and"
        " checked again; a better attack may find more."
        if accuracy
        else "An empirical lower bound on the worst error: a better attack may find a larger one."
    )
    if queries is not None:
        worst += f" The model has no gradient: at most {queries} queries per sample and norm were made."
    kinds = [Evidence("curves.NORM.points", "attack", "upper bound" if accuracy else "lower bound", worst)]
    if average:
        kinds.append(
            Evidence(
                "curves.NORM.average",
                "average",
                "interval",
                "A statistical estimate, with a 95 % interval, of the error at random points of the same ball and"
                " bounds around these samples; it says nothing of the worst point.",
            )
        )
    if corruptions:
        kinds.append(
            Evidence(
                "corruptions.NAME.points",
                "average",
                "interval",
                "A statistical estimate, with a 95 % interval, under the corruptions that were given, at the"
                " severities that were given; it says nothing of others, and nothing of the worst case.",
            )
        )
    return tuple(kinds)
