"""Checks by rivals: attacks that need no gradient of the model, and should break nothing that the solvers left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rai_toolbox.perturbations.losses import margin
from rai_toolbox.robustness.attack._blackbox import noise_breaks, random_search_breaks
from rai_toolbox.robustness.attack._bpda import BPDA
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import run_solver
from rai_toolbox.robustness.attack._substitutes import by_differences, length_of_steps, with_gradient_of
from rai_toolbox.robustness.attack._twin import distill
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, middle, nothing, per_norm, worst
from rai_toolbox.robustness.checks._effort import (
    ASCENT_STEPS,
    BLIND,
    DIFFERENCES,
    ELSEWHERE,
    ELSEWHERE_STEPS,
    TRANSFER,
    Effort,
    Rival,
)
from rai_toolbox.robustness.checks._probes import in_doubt

# What the solvers did not reach, when nothing is reported in a norm or all of it is broken.
_PART = 0.85
# A blind search that is of use finds errors within so many times the distance at which the solvers do.
_EASY = 2.0
# Of the distance that this quick search finds.
_ELSEWHERE_PART = 0.75


@dataclass
class NearlyBroken:
    """Samples that are nearly broken, each with a radius within which it stands."""

    x: Tensor
    target: Tensor
    epsilon: Tensor  # shape (N,): the largest reported radius at which each stands, as far as the solvers know
    distance: Tensor  # shape (N,): at which they broke each, or infinity


def _effort(context: CheckContext, rival: Rival, norm: Norm) -> Effort:
    spent = context.spent / max(1, len(context.curves))
    return rival.effort(context.sizes, norm, spent, doubt=in_doubt(context))


def _too_small() -> CheckResult:
    return CheckResult(
        "not run", "No probe leaves a doubt, and beside an evaluation as small as this one it would cost too much."
    )


def nearly_broken(context: CheckContext, norm: Norm, effort: Effort) -> NearlyBroken | None:
    """Return those samples that a somewhat better attack would break first; None if there are none."""
    subject = context.subject
    count = effort.samples
    if norm not in context.distance:
        return _nearly_broken_elsewhere(context, norm, effort)
    distance = context.distance[norm]
    able = np.flatnonzero(distance > 0)
    if not len(able):
        return None
    grid = np.array([0.0] + [point.epsilon for point in context.curves[norm].points[1:]])
    # The largest radius below the distance: at a radius that is exactly a distance found, the sample does not stand.
    stands = grid[np.searchsorted(grid, distance[able], side="left") - 1]
    below = stands == 0
    stands = np.where(below, _PART * np.minimum(distance[able], grid[-1]), stands)
    if norm == "l0":
        stands = np.floor(stands)
        able, stands, below = able[stands > 0], stands[stands > 0], below[stands > 0]
    if not len(able):
        return None
    # Those that no reported radius leaves standing come last.
    order = np.lexsort((distance[able] / np.maximum(stands, 1e-30), below))[:count]
    chosen = able[order]
    x, target = subject.subset(chosen.tolist())
    return _nearly_broken_of(x, target, stands[order], distance[chosen])


def _nearly_broken_elsewhere(context: CheckContext, norm: Norm, effort: Effort) -> NearlyBroken | None:
    """Return samples with radii below what the solver needs in a norm that was not asked for."""
    subject = context.subject
    if norm not in context.elsewhere:
        indices = context.subset_indices(effort.samples)
        x, target = subject.subset(indices.tolist())
        found = run_solver(
            subject, x, target, norm=norm, purpose=("elsewhere", norm), steps=ELSEWHERE_STEPS, restarts=effort.restarts,
        )  # fmt: skip
        context.elsewhere[norm] = indices, found.distance
    indices, distance = context.elsewhere[norm]
    keep = np.isfinite(distance) & (distance > 0)
    if not keep.any():
        return None
    x, target = subject.subset(indices[keep].tolist())
    return _nearly_broken_of(x, target, _ELSEWHERE_PART * distance[keep], distance[keep])


def _nearly_broken_of(x: Tensor, target: Tensor, epsilon: NDArray, distance: NDArray) -> NearlyBroken | None:
    if not len(x):
        return None
    return NearlyBroken(
        x, target, torch.from_numpy(epsilon).to(x.device), torch.from_numpy(distance.astype(np.float64)).to(x.device)
    )


def _verdict(broken: int, count: int, words: str, evidence: dict[str, Any], fine: str) -> CheckResult:
    if broken >= max(2, 0.03 * count):
        return CheckResult(
            "distrust", f"{words} broke {broken} of {count} samples that the solvers left standing.", evidence
        )
    if broken:
        return CheckResult("warning", f"{words} broke 1 of {count} samples that the solvers left standing.", evidence)
    return CheckResult("ok", fine, evidence)


def _masking(context: CheckContext) -> CheckResult:
    norms: list[Norm] = [norm for norm in context.subject.settings.norms if context.curves.get(norm) is not None]
    seen: dict[Norm, CheckResult] = {norm: _blind(context, norm) for norm in norms}
    if "linf" not in norms and context.sizes.checked == 1:
        # A blind search is strongest there, and a gradient that misleads in one norm does in another.
        elsewhere = _blind(context, "linf")
        if elsewhere.verdict != "not run":
            seen["linf"] = elsewhere
    return worst(seen)


def _blind(context: CheckContext, norm: Norm) -> CheckResult:
    subject = context.subject
    effort = _effort(context, BLIND if norm in context.distance else ELSEWHERE, norm)
    if not effort.samples:
        return _too_small()
    near = nearly_broken(context, norm, effort)
    if near is None:
        return nothing()
    by_noise = noise_breaks(subject, near.x, near.target, norm=norm, epsilon=near.epsilon, draws=effort.draws)
    by_search = random_search_breaks(
        subject, near.x, near.target, norm=norm, epsilon=near.epsilon, queries=effort.queries
    )
    broken = by_noise | by_search
    if norm not in context.distance and broken.any():
        # How far the solver gets in this norm was looked at quickly: it may try again.
        again = run_solver(
            subject, near.x[broken], near.target[broken], norm=norm, epsilon=near.epsilon[broken],
            purpose=("elsewhere again", norm),
        )  # fmt: skip
        broken[broken.clone()] = torch.from_numpy(~np.isfinite(again.distance)).to(broken.device)
    missed = int(broken.sum())
    evidence: dict[str, Any] = {
        "samples": len(near.x),
        "broken_by_random_points": int(by_noise.sum()),
        "queries": effort.queries,
        "broken_by_random_search": int(by_search.sum()),
    }
    if missed:
        return _verdict(missed, len(near.x), "Attacks without gradient", evidence, "")
    known = near.distance.isfinite()
    if not known.any():
        return CheckResult("ok", "Random noise and a random search break no sample that the solvers did not.", evidence)
    easy = _EASY * near.distance[known]
    easy = easy.ceil() if norm == "l0" else easy
    able = random_search_breaks(
        subject,
        near.x[known],
        near.target[known],
        norm=norm,
        epsilon=easy,
        queries=effort.easy_queries,
    )
    share = float(able.double().mean())
    evidence["share_broken_by_random_search_where_the_solvers_need_half"] = share
    if share < 0.1:
        return CheckResult(
            "not conclusive",
            f"A random search is too weak to tell: {effort.easy_queries} queries at twice the distance that the solvers"
            f" need break {100 * share:.0f} % of the samples.",
            evidence,
        )
    return CheckResult("ok", "Random noise and a random search break no sample that the solvers did not.", evidence)


def _differences(context: CheckContext, norm: Norm) -> CheckResult:
    effort = _effort(context, DIFFERENCES, norm)
    if not effort.samples:
        return _too_small()
    near = nearly_broken(context, norm, effort)
    if near is None:
        return nothing()
    subject = context.subject
    size = near.x[0].numel()
    epsilon = float(near.epsilon.median())
    broken = torch.zeros(len(near.x), dtype=torch.bool)
    evidence: dict[str, Any] = {"samples": len(near.x)}
    for single in (False, True):
        step = length_of_steps(norm, epsilon, size, context.width, single=single)
        through = by_differences(
            subject.model, step=step, generator=subject.generator("differences", norm, single), single=single,
            count=effort.directions,
        )  # fmt: skip
        found = run_solver(
            subject, near.x, near.target, norm=norm, epsilon=near.epsilon, purpose=("differences", norm, single),
            steps=ASCENT_STEPS, restarts=1, through=through,
        )  # fmt: skip
        mine = torch.from_numpy(np.isfinite(found.distance))
        evidence[f"broken_along_{'single_entries' if single else 'random_directions'}"] = int(mine.sum())
        broken |= mine
    return _verdict(
        int(broken.sum()), len(near.x), "Ascent by finite differences", evidence,
        "Ascent by finite differences breaks no sample that the solvers did not.",
    )  # fmt: skip


def _backward_pass(context: CheckContext, norm: Norm) -> CheckResult:
    near = nearly_broken(context, norm, Effort.usual(context.sizes))
    if near is None:
        return nothing()
    subject = context.subject
    through = BPDA(subject.model)
    replaced = through.replaces(near.x[:4])
    if not replaced:
        return CheckResult("ok", "Nothing that hides a gradient is seen inside the model.", {"samples": len(near.x)})
    found = run_solver(
        subject, near.x, near.target, norm=norm, epsilon=near.epsilon, purpose=("backward pass", norm),
        steps=ASCENT_STEPS, restarts=1, through=through,
    )  # fmt: skip
    broken = int(np.isfinite(found.distance).sum())
    evidence = {"samples": len(near.x), "replaced": ", ".join(replaced), "broken_with_another_backward_pass": broken}
    return _verdict(
        broken, len(near.x), f"Ascent with another backward pass of {', '.join(replaced[:4])}", evidence,
        f"Another backward pass of {', '.join(replaced[:4])} finds no more.",
    )  # fmt: skip


def _transfer(context: CheckContext, norm: Norm) -> CheckResult:
    effort = _effort(context, TRANSFER, norm)
    if not effort.samples:
        return _too_small()
    near = nearly_broken(context, norm, effort)
    if near is None:
        return nothing()
    subject = context.subject
    epsilon = middle(context, norm)
    pool, labels = context.batch(256)
    radius = 1.5 * length_of_steps(norm, epsilon, near.x[0].numel(), context.width, single=norm in ("l1", "l0")) / 0.3
    twin = distill(
        subject.model,
        pool,
        radius=radius,
        box=subject.box,
        generator=subject.generator("twin", norm),
        points=effort.points,
        steps=150,
    )
    with torch.no_grad():
        agree = float(((margin(twin(pool), labels) < 0).double()).mean())
    broken = torch.zeros(len(near.x), dtype=torch.bool)
    evidence: dict[str, Any] = {"samples": len(near.x), "share_of_samples_that_the_twin_gets_right": agree}
    for words, through in (("with_its_gradient", with_gradient_of(subject.model, twin)), ("alone", twin)):
        found = run_solver(
            subject, near.x, near.target, norm=norm, epsilon=near.epsilon, purpose=("transfer", norm, words),
            steps=20, restarts=2, through=through, to_the_end=words == "alone",
        )  # fmt: skip
        mine = torch.from_numpy(np.isfinite(found.distance))
        evidence[f"broken_{words}"] = int(mine.sum())
        broken |= mine
    return _verdict(
        int(broken.sum()), len(near.x), "Attacks on a network distilled from the answers", evidence,
        "Attacks on a network distilled from the answers break no sample that the solvers did not.",
    )  # fmt: skip


RIVALS = (
    Check("gradient-masking", "Would attacks without gradient find more?", _masking, True, True),
    Check(
        "finite-differences", "Would differences instead of the gradient find more?", per_norm(_differences), True, True
    ),
    Check("bpda", "Would another backward pass find more?", per_norm(_backward_pass), True, True),
    Check("transfer", "Would attacks on a copy of the model find more?", per_norm(_transfer), True, True),
)
