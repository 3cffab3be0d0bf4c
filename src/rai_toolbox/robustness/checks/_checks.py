"""The interface of a check, and how it is run.

The checks are in `_model_checks.py`, `_probes.py`, `_search_checks.py`, `_rivals.py` and `_agreement.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.robustness._errors import EvaluationFailed, InputError
from rai_toolbox.robustness._results import COULD_NOT_BE_MADE, Curve, Finding, Verdict, jsonable
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.attack._budget import Budget
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.data._samples import Summary
from rai_toolbox.robustness.session._journal import Journal

Made = TypeVar("Made")

_SUBSET = 64
_NEARLY_ALL = 0.95
_TOO_LATE = "The time limit ended the run before it."


@dataclass
class CheckContext:
    """The input of a check."""

    # subject, summary: what is evaluated, and what one pass over the samples found
    subject: Subject
    summary: Summary
    curves: Mapping[str, Curve]  # the results, by norm
    # distance, error: per-sample results, by norm
    distance: Mapping[str, NDArray]
    error: Mapping[str, NDArray]
    clean: NDArray  # whether each sample is right unperturbed (classification), or its error (regression)
    rejected: int  # how many points of a solver failed the second look of `attack`
    spent: float = math.inf  # how many samples went through the model, forwards or back, until the checks began
    # Indices and distances in norms that were not asked for, once a check has looked there.
    elsewhere: dict[str, tuple[NDArray, NDArray]] = field(default_factory=dict)
    _known: dict[object, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Budget:
        """How large the parts of a check are."""
        return self.subject.settings.sizes

    @property
    def width(self) -> float:
        """How far apart the smallest and the largest entry of the data are."""
        return self.summary.maximum - self.summary.minimum or 1.0

    def subset_indices(self, count: int = _SUBSET) -> NDArray:
        """Return evenly spaced indices of samples that the model gets right (regression: of any), at most
        the share of `count` that the budget has.
        """
        count = self.sizes.of_usual(count)
        able = np.flatnonzero(self.clean) if self.subject.classifies else np.arange(len(self.clean))
        if len(able) <= count:
            return able
        return able[np.linspace(0, len(able) - 1, count).round().astype(int)]

    def once(self, name: object, make: Callable[[], Made]) -> Made:
        """Return what several checks need, made by the first: the same whichever check and process that is."""
        if name not in self._known:
            torch.manual_seed(self.subject.settings.seed)
            self._known[name] = make()
            torch.manual_seed(self.subject.settings.seed)
        return self._known[name]

    def batch(self, count: int = _SUBSET) -> tuple[torch.Tensor, torch.Tensor]:
        """Return their inputs and targets."""
        return self.subject.subset(self.subset_indices(count).tolist())


@dataclass(frozen=True)
class CheckResult:
    """The result of a check: its verdict, one sentence, and the numbers."""

    verdict: Verdict
    summary: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A named check."""

    # name, title: as in `Finding`
    name: str
    title: str
    run: Callable[[CheckContext], CheckResult]  # from the context to the result
    classification_only: bool = False  # whether it needs decisions
    needs_gradient: bool = False  # whether it asks something of the gradient


_RANKED: tuple[Verdict, ...] = ("not run", "ok", "not conclusive", "warning", "distrust")


def worst(seen: Mapping[Norm, CheckResult]) -> CheckResult:
    """Return one finding for all norms: the gravest verdict and its sentence, the evidence of all."""
    gravest = max(seen, key=lambda norm: _RANKED.index(seen[norm].verdict))
    if len(seen) == 1:
        return seen[gravest]
    evidence = {f"{name} ({norm})": value for norm, one in seen.items() for name, value in one.evidence.items()}
    chosen = seen[gravest]
    where = "" if chosen.verdict == "ok" else f" ({gravest})"
    return CheckResult(chosen.verdict, chosen.summary + where, evidence)


def per_norm(check: Callable[[CheckContext, Norm], CheckResult]) -> Callable[[CheckContext], CheckResult]:
    """Return the check of all norms that a check of one makes."""

    def run(context: CheckContext) -> CheckResult:
        return worst({norm: check(context, norm) for norm in context.subject.settings.norms if norm in context.curves})

    return run


def middle(context: CheckContext, norm: Norm) -> float:
    """Return the reported epsilon at which about half of what the model can do is left, but none beyond the nearest
    errors of all but a twentieth of the samples: how a model behaves farther away changes no figure by more.
    """
    points = context.curves[norm].points
    if not context.subject.classifies:
        return points[max(1, len(points) // 2)].epsilon
    epsilon = min(points[1:], key=lambda point: abs(point.value - points[0].value / 2)).epsilon
    right = context.distance[norm][context.distance[norm] > 0]
    return min(epsilon, float(np.quantile(right, _NEARLY_ALL, method="higher"))) if len(right) else epsilon


def nothing() -> CheckResult:
    """Return what a check says that has nothing to look at."""
    return CheckResult("not run", "There are too few samples that the model gets right.", COULD_NOT_BE_MADE)


def run_check(check: Check, context: CheckContext, journal: Journal, *, skip: bool) -> Finding:
    """Run a check, or read its finding from the journal."""
    name = f"check-{check.name}"
    if check.classification_only and not context.subject.classifies:
        return Finding(check.name, check.title, "not run", "It is for classification.")
    if check.needs_gradient and context.subject.settings.draws > 1:
        why = "The model is random: its decisions are votes, and this check asks only once."
        return Finding(check.name, check.title, "not run", why)
    if check.needs_gradient and not context.subject.has_gradient:
        return Finding(check.name, check.title, "not run", "The model has no gradient.")
    if check.name in context.sizes.without:
        left_out = f"The budget {context.subject.settings.budget!r} leaves it out."
        return Finding(check.name, check.title, "not run", left_out, COULD_NOT_BE_MADE)
    if (piece := journal.get(name)) is not None:
        return Finding(check.name, check.title, **json.loads(str(piece["finding"])))
    if skip:
        return Finding(check.name, check.title, "not run", _TOO_LATE, COULD_NOT_BE_MADE)
    try:
        torch.manual_seed(context.subject.settings.seed)
        context.subject.cut = False
        context.subject.begin(math.inf)
        seen = check.run(context)
        if context.subject.cut:  # a search that was cut short would find nothing wrong
            return Finding(check.name, check.title, "not run", _TOO_LATE, COULD_NOT_BE_MADE)
    except SolveEnded:
        return Finding(check.name, check.title, "not run", _TOO_LATE, COULD_NOT_BE_MADE)
    except (InputError, EvaluationFailed):
        raise
    except (Exception, SystemExit) as error:  # the user's model, at an input of the check's making
        seen = CheckResult("warning", f"The check could not be made: {one_line(error)}", COULD_NOT_BE_MADE)
    finding = jsonable(vars(seen))
    journal.put(name, {"finding": json.dumps(finding)})
    return Finding(check.name, check.title, **finding)
