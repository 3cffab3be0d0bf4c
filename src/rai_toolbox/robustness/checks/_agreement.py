"""Decide whether stronger attacks are needed, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._results import Finding, Verdict
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult

_NAME = "stronger-attacks"
# The checks that doubt the gradient, or found what the solvers did not.
_DOUBTS = (
    "zero-gradients", "gradient-agreement", "boundary-jump", "loss-rises", "gradient-masking", "finite-differences",
    "bpda", "transfer",
)  # fmt: skip
# Of these, what agreeing attacks answer; that there is no gradient, or a false one, stays as it is.
_ANSWERED = ("gradient-agreement", "boundary-jump", "finite-differences", "bpda", "transfer")
# What they answer only where they changed the curve, and agree without the solvers.
_ANSWERED_ANEW = "gradient-masking"
_CLOSE = 0.05
_SMALL = 0.01
# Into how many parts the way from one reported epsilon to the next is cut.
_PARTS = 4


def asks_for_more(findings: tuple[Finding, ...]) -> bool:
    """Say whether a check doubts the gradient."""
    return any(finding.check in _DOUBTS and finding.verdict in ("warning", "distrust") for finding in findings)


def judged(
    findings: tuple[Finding, ...], attacks: Mapping[str, Mapping[str, NDArray]], grids: Mapping[str, tuple[float, ...]]
) -> tuple[Finding, ...]:
    """Return the findings with the verdict of the stronger attacks.

    Where two attacks of different kinds leave nearly the same accuracy at every reported epsilon, and no other leaves
    less, the figures are those of attacks that agree: what doubts the gradient is a warning then.

    attacks: by norm, the distances that each attack found; the first is what the solvers found.
    grids: the reported radii.
    """
    evidence: dict[str, float | str] = {}
    drop = 0.0
    for norm, by_attack in attacks.items():
        names = list(by_attack)
        least = np.min(list(by_attack.values()), axis=0)
        for epsilon in grids[norm]:
            shares = {name: float((distance > epsilon).mean()) for name, distance in by_attack.items()}
            final = float((least > epsilon).mean())
            drop = max(drop, shares[names[0]] - final)
            evidence[f"accuracy at {epsilon:g} ({norm})"] = final
            for name, share in shares.items():
                evidence[f"left by {name} at {epsilon:g} ({norm})"] = share
        first = np.argmin(np.stack(list(by_attack.values())), axis=0)
        broken = np.isfinite(least) & (least > 0)
        for number, name in enumerate(names):
            evidence[f"nearest errors found by {name} ({norm})"] = int((broken & (first == number)).sum())
    # Where the curve is another one now, attacks must agree between the reported radii too.
    changed = drop > _CLOSE
    radii = {norm: _radii(grids[norm], _PARTS if changed else 1) for norm in attacks}
    gap = max((_gap(list(found.values()), radii[norm]) for norm, found in attacks.items()), default=0.0)
    agree = gap <= _CLOSE
    answered = _ANSWERED if agree else ()
    # The first attack is the solvers.
    if (
        agree
        and changed
        and all(_gap(list(found.values())[1:], radii[norm]) <= _CLOSE for norm, found in attacks.items())
    ):
        answered += (_ANSWERED_ANEW,)
    verdict, told = _told(drop, gap)
    more = "The figures are those of stronger attacks now, which agree."
    if drop <= _SMALL:
        more = "Stronger attacks found no more, so the figures stand."
    after = []
    for finding in findings:
        if finding.check == _NAME:
            finding = replace(finding, verdict=verdict, summary=told, evidence=evidence)
        elif finding.check in answered and finding.verdict == "distrust":
            finding = replace(finding, verdict="warning", summary=f"{finding.summary} {more}")
        after.append(finding)
    return tuple(after)


def _told(drop: float, gap: float) -> tuple[Verdict, str]:
    """Return the verdict on a curve that was lowered by `drop`, by attacks of which the two best differ by `gap`."""
    if drop <= _SMALL:
        return "warning", "Stronger attacks, which do without the model's gradient, found no more than the solvers."
    lowered = f"Stronger attacks lowered the curve by up to {drop:.2f}"
    if gap <= _CLOSE:
        return "warning", f"{lowered}, and the two best agree within {gap:.2f}: the figures are theirs."
    if drop <= _CLOSE:
        return "warning", f"{lowered}: the solvers had found nearly all errors."
    return "distrust", f"{lowered}, and the two best differ by up to {gap:.2f}: the true curve may be lower still."


def _gap(distances: Sequence[NDArray], radii: NDArray) -> float:
    """Return by how much more the second best attack leaves than all together, at the radius where that is most."""
    left = np.stack([distance > radii[:, None] for distance in (*distances, np.min(distances, axis=0))]).mean(axis=2)
    return float((np.sort(left[:-1], axis=0)[1] - left[-1]).max())


def _radii(grid: tuple[float, ...], parts: int) -> NDArray:
    """Return the reported radii, with others between that cut each way from one to the next into so many parts."""
    places = np.arange(1, parts * len(grid) + 1) / parts
    return np.interp(places, np.arange(len(grid) + 1), (0.0, *grid))


def _not_asked(context: CheckContext) -> CheckResult:
    settings = context.subject.settings
    if not (settings.adaptive and settings.sizes.adaptive):
        return CheckResult("not run", "They were left out, by --no-adaptive or by --budget quick.")
    return CheckResult("ok", "None was run: they follow only where a check doubts the gradient.")


AGREEMENT = (Check(_NAME, "Do stronger attacks agree?", _not_asked, classification_only=True),)
