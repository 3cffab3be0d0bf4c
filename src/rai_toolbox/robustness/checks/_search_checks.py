"""Checks of the search: did the solvers do their work, or would something else have found more?"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent
from rai_toolbox.perturbations.losses import margin, squared_error
from rai_toolbox.robustness.attack._budget import USUAL_RESTARTS, longer_search
from rai_toolbox.robustness.attack._grid import widest_radius
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import run_solver
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, middle, nothing, per_norm

_ENOUGH_RESTARTS = 4
_PLAIN_STEPS = 10
# By how much nearer than known a sample is tried; and by how much a curve may be too far without being quite wrong.
_CLOSE, _FAR = 0.02, 0.1
_SUBSET = 48
_LOOKED_AT, _TRIED_AGAIN = 6, 16
# So many samples that are broken nearer say that a search is too short: if it was shorter than the one it is compared
# with, and if it was as long, where each finds some that the other misses.
_IF_SHORTER, _IF_AS_LONG = 2, 4
# Of how many samples the loss should rise: of a few first, of all where it does not.
_FIRST, _ALL = 12, 64


def _verification(context: CheckContext) -> CheckResult:
    evidence = {"points_that_were_not_what_the_solver_said": context.rejected}
    if context.rejected:
        return CheckResult(
            "distrust",
            f"{context.rejected} results of a solver did not hold when checked again; they were not counted.",
            evidence,
        )
    return CheckResult(
        "ok", "Every perturbed input was checked again: distance, bounds and the model's answer hold.", evidence
    )


def _loss_rises(context: CheckContext, norm: Norm) -> CheckResult:
    first = _risen(context, norm, _FIRST)
    return first if first.verdict in ("ok", "not run") else _risen(context, norm, _ALL)


def _risen(context: CheckContext, norm: Norm, count: int) -> CheckResult:
    x, target = context.batch(count)
    if not len(x):
        return nothing()
    epsilon = middle(context, norm)
    if norm == "linf":
        optimizer: Any = LinfProjectedOptim
        radius = epsilon
    else:
        # Plain steps know two balls; what L1 and L0 reach is within L2's reach too.
        optimizer = L2ProjectedOptim
        radius = epsilon if norm == "l2" else _l2_of(context, norm, epsilon)
    criterion = margin if context.subject.classifies else squared_error
    # A little off the sample: a squared error of zero has no gradient.
    noise = torch.randn(x.shape, generator=context.subject.generator("loss rises", norm)).to(x)
    x = x + 0.05 * radius * noise / noise.flatten(1).abs().amax()
    with torch.no_grad():
        before = criterion(context.subject.model(x), target)
    _, after = gradient_ascent(
        model=context.subject.model, data=x, target=target, optimizer=optimizer, steps=_PLAIN_STEPS,
        criterion=criterion, lr=radius / 4, epsilon=radius,
    )  # fmt: skip
    share = float((after > before).double().mean())
    evidence = {
        "samples": len(x),
        "steps": _PLAIN_STEPS,
        "epsilon": epsilon,
        "share_whose_loss_rose": share,
        "median_rise": float((after - before).nan_to_num(nan=0.0).median()),
    }
    if share < 0.9:
        return CheckResult(
            "distrust" if share < 0.5 else "warning",
            f"After {_PLAIN_STEPS} plain steps along the gradient the loss is higher for only {100 * share:.0f} %"
            " of the samples tried.",
            evidence,
        )
    return CheckResult("ok", "Steps along the gradient raise the loss.", evidence)


def _convergence(context: CheckContext, norm: Norm) -> CheckResult:
    """Try some samples a little nearer than they are known to be broken, by a search that is not cut short.

    A few first; where one of them is broken, all; where two are, see how much nearer they come.
    """
    subject, sizes = context.subject, context.sizes
    if not subject.classifies:
        return _error_converges(context, norm)
    indices = context.subset_indices(_TRIED_AGAIN)
    known = context.distance[norm][indices]
    within = known - 1 if norm == "l0" else (1 - _CLOSE) * known
    within = np.where(np.isfinite(within), within, context.curves[norm].points[-1].epsilon)
    able = np.flatnonzero(within > 0)
    if not len(indices):
        return nothing()
    steps, restarts = longer_search(sizes)
    broken = np.zeros(len(indices), dtype=bool)
    if not len(able):
        return CheckResult("ok", "Each sample tried is broken by one changed feature: no error is nearer.", {})
    first = np.isin(able, able[np.linspace(0, len(able) - 1, _LOOKED_AT).round().astype(int)])
    tried = 0
    for rows in (able[first], able[~first]):
        if not len(rows) or (tried and not broken.any()):
            break
        x, target = subject.subset(indices[rows].tolist())
        found = run_solver(
            subject, x, target, norm=norm, epsilon=torch.from_numpy(within[rows]).to(x.device),
            purpose=("convergence", norm, tried), steps=steps, restarts=restarts,
        )  # fmt: skip
        broken[rows] = np.isfinite(found.distance)
        tried += len(rows)
    nearer = "with one changed feature fewer" if norm == "l0" else f"{100 * _CLOSE:.0f} % nearer"
    evidence = {
        "samples": tried,
        "steps_used": sizes.steps,
        "restarts_used": sizes.restarts,
        "steps_of_the_longer_search": steps,
        "restarts_of_the_longer_search": restarts,
        "samples_broken_nearer": int(broken.sum()),
    }
    shorter = sizes.steps * sizes.restarts < steps * restarts
    if broken.sum() < (_IF_SHORTER if shorter else _IF_AS_LONG):
        count = ("none", "one", "two", "three")[int(broken.sum())]
        return CheckResult(
            "ok", f"A search of {steps * restarts} passes breaks {count} of {tried} samples {nearer}.", evidence
        )
    return _how_much_nearer(context, norm, indices, known, nearer, evidence)


def _how_much_nearer(
    context: CheckContext, norm: Norm, indices: NDArray, known: NDArray, nearer: str, evidence: dict[str, Any]
) -> CheckResult:
    """Judge a search that misses nearer errors: by the median distance, and where half of the samples stand."""
    steps, restarts = longer_search(context.sizes)
    x, target = context.subject.subset(indices.tolist())
    found = run_solver(
        context.subject, x, target, norm=norm, purpose=("convergence", norm), steps=steps, restarts=restarts
    )
    more = np.minimum(known, found.distance)
    # Where all stand, or none, nothing can be seen.
    epsilon = float(np.sort(known)[(len(known) - 1) // 2])
    epsilon = epsilon * (1 - _CLOSE) if np.isfinite(epsilon) else middle(context, norm)
    lost = int(((known > epsilon) & (more <= epsilon)).sum())
    # Between the reported radii the curve can be too high where no reported figure is.
    radii = np.array([point.epsilon for point in context.curves[norm].points])
    reported = int(((known > radii[:, None]) & (more <= radii[:, None])).any(axis=0).sum())
    before, after = float(np.median(known)), float(np.median(more))
    fall = 1 - after / before if np.isfinite(before) else float(np.isfinite(after))
    evidence |= {
        "median_distance_found": before,
        "median_distance_of_the_longer_search": after,
        "at_epsilon": epsilon,
        "samples_lost_there": lost,
        "samples_lost_at_reported_epsilons": reported,
    }
    message = (
        f"A search of {steps * restarts} passes breaks {evidence['samples_broken_nearer']} of {len(known)} samples"
        f" {nearer}; the median distance falls by {100 * fall:.1f} %, and at epsilon {epsilon:.3g}"
        f" {lost or 'no'} more {'sample is' if lost == 1 else 'samples are'} broken."
    )
    grave = lost >= max(4, 0.2 * len(known)) and (reported or fall > _FAR)
    return CheckResult("distrust" if grave else "warning", message, evidence)


def _error_converges(context: CheckContext, norm: Norm) -> CheckResult:
    """Try some samples of a regression again, at the epsilon in the middle of the reported ones."""
    indices = context.subset_indices(_TRIED_AGAIN)
    if not len(indices):
        return nothing()
    points = context.curves[norm].points
    level, usual = max(1, len(points) // 2), context.sizes.steps
    x, target = context.subject.subset(indices.tolist())
    restarts = 1 if context.sizes.restarts >= _ENOUGH_RESTARTS else USUAL_RESTARTS
    found = run_solver(
        context.subject, x, target, norm=norm, epsilon=points[level].epsilon, purpose=("convergence", norm),
        steps=4 * usual, restarts=restarts,
    )  # fmt: skip
    known = context.error[norm][level, indices]
    used, more = float(known.mean()), float(np.maximum(known, found.error).mean())
    rise = more / max(used, 1e-30) - 1
    evidence = {
        "samples": len(x),
        "steps_used": usual,
        "mean_error": used,
        "mean_error_with_four_times_the_steps": more,
        "epsilon": points[level].epsilon,
    }
    if rise > 0.02:
        message = f"Four times the steps raise the error by {100 * rise:.0f} %."
        return CheckResult("distrust" if rise > 0.1 else "warning", message, evidence)
    return CheckResult("ok", "Four times the steps do not raise the error.", evidence)


def _large_epsilon(context: CheckContext, norm: Norm) -> CheckResult:
    subject = context.subject
    widest = widest_radius(norm, context.summary, subject.box, subject.samples.shape)
    indices = context.subset_indices(_SUBSET)
    if not len(indices):
        return nothing()
    if not subject.classifies:
        return _error_grows(context, norm, indices, widest)
    standing = indices[context.distance[norm][indices] > widest]
    if len(standing):
        x, target = subject.subset(standing.tolist())
        found = run_solver(subject, x, target, norm=norm, epsilon=widest, purpose=("large epsilon", norm))
        standing = standing[~np.isfinite(found.distance)]
    share = len(standing) / len(indices)
    evidence = {"samples": len(indices), "epsilon": widest, "accuracy_there": share}
    if len(standing) >= 2 and share > 0.05:
        return CheckResult(
            "distrust",
            f"At epsilon {widest:.3g}, enough to turn any sample into any other, {100 * share:.0f} % of those"
            " tried still stand.",
            evidence,
        )
    return CheckResult(
        "ok", f"At epsilon {widest:.3g}, enough to turn any sample into any other, nothing stands.", evidence
    )


def _error_grows(context: CheckContext, norm: Norm, indices: NDArray, widest: float) -> CheckResult:
    subject = context.subject
    x, target = subject.subset(indices.tolist())
    before = float(context.error[norm][-1, indices].mean())
    # A few restarts are enough to exceed what is found at a smaller epsilon; where they are not, all of them try.
    for restarts in (1, None):
        found = run_solver(
            subject, x, target, norm=norm, epsilon=widest, purpose=("large epsilon", norm), restarts=restarts
        )
        after = float(found.error.mean())
        if after > before * (1 + 1e-6):
            break
    evidence = {
        "samples": len(x),
        "epsilon": widest,
        "mean_error_there": after,
        "mean_error_at_the_largest_epsilon": before,
    }
    if widest > context.curves[norm].points[-1].epsilon and after <= before * (1 + 1e-6):
        return CheckResult(
            "distrust",
            f"At epsilon {widest:.3g} the error is no larger than at the largest epsilon reported.",
            evidence,
        )
    return CheckResult("ok", "The error goes on growing with epsilon.", evidence)


def _l2_of(context: CheckContext, norm: Norm, epsilon: float) -> float:
    if norm == "l1":
        return epsilon
    width = context.summary.maximum - context.summary.minimum
    return cast(float, max(epsilon, 1.0) ** 0.5 * (width or 1.0))


SEARCH_CHECKS = (
    Check("verification", "Do the solvers' results hold when checked again?", _verification),
    Check("loss-rises", "Does the loss rise along the gradient?", per_norm(_loss_rises), needs_gradient=True),
    Check("convergence", "Would a longer search find more?", per_norm(_convergence), needs_gradient=True),
    Check("large-epsilon", "Does any sample withstand a huge change?", per_norm(_large_epsilon), needs_gradient=True),
)
