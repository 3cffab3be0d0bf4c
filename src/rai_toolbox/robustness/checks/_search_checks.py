"""Checks of the search: did the solvers do their work, or would something else have found more?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent
from rai_toolbox.perturbations.losses import margin, squared_error
from rai_toolbox.robustness.attack._blackbox import noise_breaks, random_search_breaks
from rai_toolbox.robustness.attack._grid import widest_radius
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._stages import attack
from rai_toolbox.robustness.checks._checks import Check, Seen, Situation, worst

__all__ = ["SEARCH_CHECKS"]

_NOISE_DRAWS = 100
_QUERIES = 300
_USUAL_STEPS = 50  # the default of the solvers
_PLAIN_STEPS = 10
_SUBSET = 48
_TRIED_AGAIN = 24
_FEW_DIMENSIONS = 16


def _per_norm(check: Callable[[Situation, Norm], Seen]) -> Callable[[Situation], Seen]:
    def run(situation: Situation) -> Seen:
        return worst(
            {norm: check(situation, norm) for norm in situation.bench.settings.norms if norm in situation.curves}
        )

    return run


def _verification(situation: Situation) -> Seen:
    evidence = {"points_that_were_not_what_the_solver_said": situation.rejected}
    if situation.rejected:
        return Seen(
            "distrust",
            f"{situation.rejected} perturbed inputs were not what the solver said when looked at again; they"
            " were not counted.",
            evidence,
        )
    return Seen(
        "ok", "Every perturbed input was looked at again: size, bounds and the model's answer are as counted.", evidence
    )


def _loss_rises(situation: Situation, norm: Norm) -> Seen:
    x, target = situation.batch()
    if not len(x):
        return _nothing()
    epsilon = _middle(situation, norm)
    if norm == "linf":
        optimizer: Any = LinfProjectedOptim
        radius = epsilon
    else:
        # Plain steps know two balls; what L1 and L0 reach is within L2's reach too.
        optimizer = L2ProjectedOptim
        radius = epsilon if norm == "l2" else _l2_of(situation, norm, epsilon)
    criterion = margin if situation.bench.classifies else squared_error
    # A little off the sample: a squared error of zero has no gradient.
    noise = torch.randn(x.shape, generator=situation.bench.generator("loss rises", norm)).to(x)
    x = x + 0.05 * radius * noise / noise.flatten(1).abs().amax()
    with torch.no_grad():
        before = criterion(situation.bench.model(x), target)
    _, after = gradient_ascent(
        model=situation.bench.model, data=x, target=target, optimizer=optimizer, steps=_PLAIN_STEPS,
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
        return Seen(
            "distrust" if share < 0.5 else "warning",
            f"After {_PLAIN_STEPS} plain steps along the gradient the loss is higher for only {100 * share:.0f} %"
            " of the samples tried.",
            evidence,
        )
    return Seen("ok", "Steps along the gradient raise the loss.", evidence)


def _convergence(situation: Situation, norm: Norm) -> Seen:
    """Try a quarter of the steps and four times as many on some samples, and see where the distances are going."""
    bench = situation.bench
    usual = bench.settings.steps or _USUAL_STEPS
    indices = situation.some(_TRIED_AGAIN)
    x, target = bench.subset(indices.tolist())
    if not len(x):
        return _nothing()
    if not bench.classifies:
        return _error_converges(situation, norm, x, target, usual)

    def distance(steps: int) -> NDArray:
        return attack(bench, x, target, norm=norm, purpose=("convergence", norm, steps), steps=steps).distance

    known = situation.distance[norm][indices]
    fewer, more = distance(max(1, usual // 4)), distance(4 * usual)
    drops = {
        point.epsilon: int((known > point.epsilon).sum() - (np.minimum(known, more) > point.epsilon).sum())
        for point in situation.curves[norm].points[1:]
    }
    epsilon, lost = max(drops.items(), key=lambda pair: pair[1])
    before, now, limit = _extrapolated(fewer, known, np.minimum(known, more))
    evidence = {
        "samples": len(x),
        "steps_used": usual,
        "median_distance_with_a_quarter_of_the_steps": before,
        "median_distance_found": now,
        "median_distance_with_four_times_the_steps": float(np.median(np.minimum(known, more))),
        "median_distance_extrapolated": limit,
        "samples_lost_with_four_times_the_steps": lost,
        "at_epsilon": epsilon,
    }
    # One sample may always fall just beside an epsilon.
    if lost >= max(3, 0.05 * len(x)):
        told = f"Four times the steps break {lost} more of {len(x)} samples at epsilon {epsilon:g}."
        return Seen("distrust", told, evidence)
    if lost >= 2 or limit < 0.9 * now:
        told = f"More steps lower the curve a little: {lost} of {len(x)} samples at epsilon {epsilon:g}."
        return Seen("warning", told, evidence)
    return Seen("ok", "Four times the steps find no more.", evidence)


def _error_converges(situation: Situation, norm: Norm, x: torch.Tensor, target: torch.Tensor, usual: int) -> Seen:
    epsilon = _middle(situation, norm)

    def error(steps: int) -> float:
        purpose = ("convergence", norm, steps)
        return float(
            attack(situation.bench, x, target, norm=norm, epsilon=epsilon, purpose=purpose, steps=steps).error.mean()
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
        told = f"Four times the steps raise the error by {100 * rise:.0f} %."
        return Seen("distrust" if rise > 0.1 else "warning", told, evidence)
    return Seen("ok", "Four times the steps find no more.", evidence)


def _extrapolated(fewer: NDArray, known: NDArray, more: NDArray) -> tuple[float, float, float]:
    """Return two median distances, and where they go if each quadrupling gains a fixed part of the last gain."""
    first, second, third = (float(np.median(one)) for one in (fewer, known, more))
    gains = first - second, second - third
    if not np.isfinite(gains).all() or gains[1] <= 0 or gains[0] <= gains[1]:
        return first, second, third
    ratio = gains[1] / gains[0]
    return first, second, third - gains[1] * ratio / (1 - ratio)


def _masking(situation: Situation, norm: Norm) -> Seen:
    bench = situation.bench
    indices = situation.some(_SUBSET)
    x, target = bench.subset(indices.tolist())
    if not len(x):
        return _nothing()
    epsilon = _middle(situation, norm)
    by_gradient = situation.distance[norm][indices] <= epsilon
    by_noise = noise_breaks(bench, x, target, norm=norm, epsilon=epsilon, draws=_NOISE_DRAWS).cpu().numpy()
    by_search = random_search_breaks(bench, x, target, norm=norm, epsilon=epsilon, queries=_QUERIES).cpu().numpy()
    blind = by_noise | by_search
    missed = int((blind & ~by_gradient).sum())
    evidence = {
        "samples": len(x),
        "epsilon": epsilon,
        "broken_by_gradient": int(by_gradient.sum()),
        f"broken_by_{_NOISE_DRAWS}_random_points": int(by_noise.sum()),
        f"broken_by_random_search_of_{_QUERIES}_queries": int(by_search.sum()),
        "broken_without_gradient_only": missed,
    }
    if missed >= max(2, 0.03 * len(x)):
        return Seen(
            "distrust",
            f"Attacks without gradient broke {missed} of {len(x)} samples that the solvers did not at epsilon"
            f" {epsilon:g}.",
            evidence,
        )
    if missed:
        told = f"At epsilon {epsilon:g} attacks without gradient broke {missed} sample that the solvers did not."
        return Seen("warning", told, evidence)
    # In a few dimensions random points are a good attack.
    if by_noise.sum() >= by_gradient.sum() > 0 and not by_gradient.all() and x[0].numel() > _FEW_DIMENSIONS:
        told = f"At epsilon {epsilon:g} random points do as well as the gradient."
        return Seen("warning", told, evidence)
    return Seen("ok", "Random noise and a random search break no sample that the solvers did not.", evidence)


def _large_epsilon(situation: Situation, norm: Norm) -> Seen:
    bench = situation.bench
    widest = widest_radius(norm, situation.summary, bench.box, bench.samples.shape)
    indices = situation.some(_SUBSET)
    if not len(indices):
        return _nothing()
    if not bench.classifies:
        return _error_grows(situation, norm, indices, widest)
    standing = indices[situation.distance[norm][indices] > widest]
    if len(standing):
        x, target = bench.subset(standing.tolist())
        found = attack(bench, x, target, norm=norm, epsilon=widest, purpose=("large epsilon", norm))
        standing = standing[~np.isfinite(found.distance)]
    share = len(standing) / len(indices)
    evidence = {"samples": len(indices), "epsilon": widest, "accuracy_there": share}
    if len(standing) >= 2 and share > 0.05:
        return Seen(
            "distrust",
            f"At epsilon {widest:.3g}, enough to turn any sample into any other, {100 * share:.0f} % of those"
            " tried still stand.",
            evidence,
        )
    return Seen("ok", f"At epsilon {widest:.3g}, enough to turn any sample into any other, nothing stands.", evidence)


def _error_grows(situation: Situation, norm: Norm, indices: NDArray, widest: float) -> Seen:
    bench = situation.bench
    x, target = bench.subset(indices.tolist())
    found = attack(bench, x, target, norm=norm, epsilon=widest, purpose=("large epsilon", norm))
    before = float(situation.error[norm][-1, indices].mean())
    after = float(found.error.mean())
    evidence = {
        "samples": len(x),
        "epsilon": widest,
        "mean_error_there": after,
        "mean_error_at_the_largest_epsilon": before,
    }
    if widest > situation.curves[norm].points[-1].epsilon and after <= before * (1 + 1e-6):
        return Seen(
            "distrust",
            f"At epsilon {widest:.3g} the error is no larger than at the largest epsilon reported.",
            evidence,
        )
    return Seen("ok", "The error goes on growing with epsilon.", evidence)


def _middle(situation: Situation, norm: Norm) -> float:
    """Return the reported epsilon at which about half of what the model can do is left."""
    points = situation.curves[norm].points
    if not situation.bench.classifies:
        return points[max(1, len(points) // 2)].epsilon
    return min(points[1:], key=lambda point: abs(point.value - points[0].value / 2)).epsilon


def _l2_of(situation: Situation, norm: Norm, epsilon: float) -> float:
    if norm == "l1":
        return epsilon
    width = situation.summary.maximum - situation.summary.minimum
    return cast(float, max(epsilon, 1.0) ** 0.5 * (width or 1.0))


def _nothing() -> Seen:
    return Seen("not run", "There are too few samples that the model gets right.")


SEARCH_CHECKS = (
    Check("verification", "Is what was found what the solvers said?", _verification),
    Check("loss-rises", "Does the loss rise along the gradient?", _per_norm(_loss_rises)),
    Check("convergence", "Would more steps find more?", _per_norm(_convergence)),
    Check(
        "gradient-masking", "Would attacks without gradient find more?", _per_norm(_masking), classification_only=True
    ),
    Check("large-epsilon", "Does anything withstand a huge change?", _per_norm(_large_epsilon)),
)
