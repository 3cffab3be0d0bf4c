"""The two stages of an evaluation for a model without a gradient: search by queries alone, within a budget."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness.attack._blackbox import random_search
from rai_toolbox.robustness.attack._bpda import BPDA
from rai_toolbox.robustness.attack._decisions import walk_along_boundary
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import CheckedResult, check_again, run_solver
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.attack._substitutes import by_differences, length_of_steps

# Of the budget of a norm, the part for the nearest error; the rest goes to the reported radii.
_NEAREST = 0.5
_POOL = 48
# Queries of a walk before its first round, and of a round beside its draws, at most.
_START, _AROUND = 160, 156
_DIRECTIONS = 32
#: A model that hides its gradient in torch is seen through by so many steps.
_STEPS, _RUNS = 30, 3


def nearest_by_queries(subject: Subject, norm: Norm, x: Tensor, target: Tensor) -> CheckedResult:
    """Return the nearest errors that a walk along the boundary finds, which asks for decisions alone.

    Where only `no_grad`, `detach` or rounding hides the gradient, a solver follows `BPDA` too.
    """
    budget = round(_NEAREST * subject.settings.queries)
    points = [("", x.clone())]
    through = BPDA(subject.model)
    if through.replaces(x[:2]):
        asked = max(1, min(_STEPS, budget // (2 * _RUNS)))
        found = run_solver(
            subject, x, target, norm=norm, purpose=("search", norm), steps=asked, restarts=_RUNS, through=through
        )
        points.append(("BPDA", found.perturbed))
        budget //= 2
    if norm == "l0":  # there is no plane to walk along
        points.append(("random search", _fewest(subject, x, target, budget)))
    else:
        points.append(("decisions", _walked(subject, norm, x, target, budget)))
    return _nearest(subject, norm, x, target, points)


def within_by_queries(
    subject: Subject, norm: Norm, x: Tensor, target: Tensor, epsilon: float, *, level: int, levels: int
) -> CheckedResult:
    """Return errors within a radius, found by ascent along differences and by random search.

    level, levels: which of how many radii: they share the budget.
    """
    budget = max(2, round((1 - _NEAREST) * subject.settings.queries / levels))
    count = min(_DIRECTIONS, x[0].numel())
    steps = budget // 2 // (2 * count + 1)
    points = []
    if steps > 1:
        width = float(x.max() - x.min()) or 1.0
        length = length_of_steps(norm, epsilon, x[0].numel(), width, single=norm in ("l1", "l0"))
        through = by_differences(
            subject.model, step=length, single=norm in ("l1", "l0"), count=count,
            generator=subject.generator("differences by queries", norm, level),
        )  # fmt: skip
        found = run_solver(
            subject, x, target, norm=norm, epsilon=epsilon, purpose=("confirm", norm, level), steps=steps, restarts=1,
            through=through,
        )  # fmt: skip
        points.append(("differences", found.perturbed))
        budget -= steps * (2 * count + 1)
    radius = torch.full((len(x),), float(epsilon), dtype=torch.float64, device=x.device)
    points.append(("random search", random_search(subject, x, target, norm=norm, epsilon=radius, queries=budget)))
    return _nearest(subject, norm, x, target, points, epsilon)


def _walked(subject: Subject, norm: Norm, x: Tensor, target: Tensor, budget: int) -> Tensor:
    count = len(subject.samples)
    pool, _ = subject.subset(np.unique(np.linspace(0, count - 1, min(count, _POOL)).round().astype(int)).tolist())

    def wrong(points: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return misclassified(subject.model(points), target[rows])

    rounds = max(1, round((budget - _START) / 300))
    return walk_along_boundary(
        wrong, x, pool, norm=norm, bounds=subject.box.of(x), generator=subject.generator("walk", norm),
        rounds=rounds, draws=max(10, (budget - _START) // rounds - _AROUND),
    )  # fmt: skip


def _fewest(subject: Subject, x: Tensor, target: Tensor, budget: int) -> Tensor:
    """Return errors with few changed entries, from random searches with ever fewer of them."""
    found, size = x.clone(), x[0].numel()
    counts = sorted({max(1, size // 2**part) for part in range(1, 8)}, reverse=True)
    open_yet = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for entries in counts:
        radius = torch.full((len(x),), float(entries), dtype=torch.float64, device=x.device)
        points = random_search(subject, x, target, norm="l0", epsilon=radius, queries=max(4, budget // len(counts)))
        with torch.no_grad():
            open_yet = misclassified(subject.model(points), target)
        found[open_yet] = points[open_yet]
    return found


def _nearest(
    subject: Subject, norm: Norm, x: Tensor, target: Tensor, points: list[tuple[str, Tensor]],
    epsilon: float | None = None,
) -> CheckedResult:  # fmt: skip
    """Return, for each sample, the nearest of the points of several attacks at which the model errs."""
    checked = [check_again(subject, x, target, one, norm=norm, by=by, epsilon=epsilon) for by, one in points]
    best = checked[0]
    for other in checked[1:]:
        nearer = other.distance < best.distance
        for name in ("distance", "prediction", "by", "errors"):
            getattr(best, name)[nearer] = getattr(other, name)[nearer]
        best.perturbed = torch.where(
            torch.from_numpy(nearer).to(x.device).reshape(-1, *[1] * (x.ndim - 1)), other.perturbed, best.perturbed
        )
    best.rejected = 0
    return best
