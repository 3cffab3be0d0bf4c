"""Checks of the search: did the solvers do their work, or would something else have found more?"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent
from rai_toolbox.perturbations.losses import margin, squared_error
from rai_toolbox.robustness.attack._budget import USUAL_RESTARTS, USUAL_STEPS
from rai_toolbox.robustness.attack._grid import widest_radius
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import run_solver
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, middle, nothing, per_norm

_ENOUGH_RESTARTS = 4
_GAIN = 0.995
_PLAIN_STEPS = 10
# By how little of the distance two searches may differ and count as the same.
_CLOSE = 0.02
_SUBSET = 48
_TRIED_AGAIN = 16


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
    x, target = context.batch()
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
    """Try a quarter of the steps and four times as many on some samples, where about half of them stand."""
    subject = context.subject
    usual = context.sizes.steps
    indices = context.subset_indices(_TRIED_AGAIN)
    x, target = subject.subset(indices.tolist())
    if not len(x):
        return nothing()
    if not subject.classifies:
        return _error_converges(context, norm, x, target, usual)

    def distance(steps: int, restarts: int | None) -> NDArray:
        purpose = ("convergence", norm, steps)
        return run_solver(subject, x, target, norm=norm, purpose=purpose, steps=steps, restarts=restarts).distance

    known = context.distance[norm][indices]
    # A search that was cut short is no measure of itself: what it is judged by has the usual runs then, unless the
    # budget has no room for them.
    restarts, least = 1 if context.sizes.restarts >= _ENOUGH_RESTARTS else USUAL_RESTARTS, USUAL_STEPS
    if context.sizes.checked < 1:
        restarts, least = context.sizes.restarts, 1
    more = np.minimum(known, distance(max(4 * usual, least), restarts))
    # Where that gains nothing, a search of fewer steps would say nothing.
    gains = float(np.median(more)) < _GAIN * float(np.median(known))
    fewer = distance(max(1, usual // 4), None) if gains else known
    # Where all stand, or none, nothing can be seen: half of the samples stand here.
    epsilon = float(np.sort(known)[(len(known) - 1) // 2])
    epsilon = epsilon * (1 - _CLOSE) if np.isfinite(epsilon) else middle(context, norm)
    lost = int(((known > epsilon) & (more <= epsilon)).sum())
    # Between the reported radii the curve can be too high where no reported figure is.
    radii = np.array([point.epsilon for point in context.curves[norm].points])
    reported = int(((known > radii[:, None]) & (more <= radii[:, None])).any(axis=0).sum())
    before, now, limit = _extrapolated(fewer, known, more)
    nearer = float(np.median(more))
    evidence = {
        "samples": len(x),
        "steps_used": usual,
        **({"median_distance_with_a_quarter_of_the_steps": before} if gains else {}),
        "median_distance_found": now,
        "median_distance_with_four_times_the_steps": nearer,
        "median_distance_extrapolated": limit,
        "samples_lost_with_four_times_the_steps": lost,
        "at_epsilon": epsilon,
        "samples_lost_at_reported_epsilons": reported,
    }
    # One sample may always fall just beside an epsilon.
    if lost >= max(4, 0.2 * len(x)) and reported:
        message = f"A search of four times the steps breaks {lost} more of {len(x)} samples at epsilon {epsilon:.3g}."
        return CheckResult("distrust", message, evidence)
    if lost >= 2 or min(nearer, limit) < 0.97 * now:
        broken = f"{lost} of {len(x)} samples" if lost else "no sample that stood before"
        message = (
            f"More steps find nearer errors, by {100 * (1 - nearer / now):.1f} % in the median, and break {broken} at"
            f" epsilon {epsilon:.3g}{'' if reported else ', and none at a reported epsilon'}."
        )
        return CheckResult("warning", message, evidence)
    return CheckResult("ok", "Four times the steps find no more.", evidence)


def _error_converges(
    context: CheckContext, norm: Norm, x: torch.Tensor, target: torch.Tensor, usual: int
) -> CheckResult:
    epsilon = middle(context, norm)

    def error(steps: int) -> float:
        purpose = ("convergence", norm, steps)
        return float(
            run_solver(
                context.subject, x, target, norm=norm, epsilon=epsilon, purpose=purpose, steps=steps
            ).error.mean()
        )

    used, more = error(usual), error(4 * usual)
    rise = more / max(used, 1e-30) - 1
    evidence = {
        "samples": len(x),
        "steps_used": usual,
        "mean_error": used,
        "mean_error_with_four_times_the_steps": more,
        "epsilon": epsilon,
    }
    if rise > 0.02:
        message = f"Four times the steps raise the error by {100 * rise:.0f} %."
        return CheckResult("distrust" if rise > 0.1 else "warning", message, evidence)
    return CheckResult("ok", "Four times the steps find no more.", evidence)


def _extrapolated(fewer: NDArray, known: NDArray, more: NDArray) -> tuple[float, float, float]:
    """Return two median distances, and where they go if each quadrupling gains a fixed part of the last gain."""
    first, second, third = (float(np.median(one)) for one in (fewer, known, more))
    gains = first - second, second - third
    if not np.isfinite(gains).all() or gains[1] <= 0 or gains[0] <= gains[1]:
        return first, second, third
    ratio = gains[1] / gains[0]
    return first, second, third - gains[1] * ratio / (1 - ratio)


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
    found = run_solver(subject, x, target, norm=norm, epsilon=widest, purpose=("large epsilon", norm))
    before = float(context.error[norm][-1, indices].mean())
    after = float(found.error.mean())
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
    Check("convergence", "Would more steps find more?", per_norm(_convergence), needs_gradient=True),
    Check("large-epsilon", "Does any sample withstand a huge change?", per_norm(_large_epsilon), needs_gradient=True),
)
