"""Decide whether stronger attacks are needed, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._results import Finding
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult

_NAME = "stronger-attacks"
# The checks that doubt the gradient, or found what the solvers did not.
_DOUBTS = (
    "zero-gradients", "gradient-agreement", "boundary-jump", "loss-rises", "gradient-masking", "finite-differences",
    "bpda", "transfer",
)  # fmt: skip
# Of these, what agreeing attacks answer; that there is no gradient, or a false one, stays as it is.
_ANSWERED = ("gradient-agreement", "boundary-jump", "finite-differences", "bpda", "transfer")
_CLOSE = 0.05


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
    gap, drop = 0.0, 0.0
    for norm, by_attack in attacks.items():
        names = list(by_attack)
        least = np.min(list(by_attack.values()), axis=0)
        for epsilon in grids[norm]:
            shares = {name: float((distance > epsilon).mean()) for name, distance in by_attack.items()}
            final = float((least > epsilon).mean())
            gap = max(gap, sorted(shares.values())[1] - final)
            drop = max(drop, shares[names[0]] - final)
            evidence[f"accuracy at {epsilon:g} ({norm})"] = final
            for name, share in shares.items():
                evidence[f"left by {name} at {epsilon:g} ({norm})"] = share
        first = np.argmin(np.stack(list(by_attack.values())), axis=0)
        broken = np.isfinite(least) & (least > 0)
        for number, name in enumerate(names):
            evidence[f"nearest errors found by {name} ({norm})"] = int((broken & (first == number)).sum())
    agree = gap <= _CLOSE
    if drop <= 0.01:
        told = "Stronger attacks found no more: the solvers did not need that gradient."
        verdict = "warning"
    elif not agree and drop <= _CLOSE:
        told = f"Stronger attacks lowered the curve by up to {drop:.2f}: the solvers had found nearly all of it."
        verdict = "warning"
    elif not agree:
        told = f"Stronger attacks lowered the curve by up to {drop:.2f}, and differ among each other by {gap:.2f}."
        verdict = "distrust"
    else:
        told = f"Stronger attacks lowered the curve by up to {drop:.2f}, and two kinds of them agree within {gap:.2f}."
        verdict = "warning"
    after = []
    for finding in findings:
        if finding.check == _NAME:
            finding = replace(finding, verdict=verdict, summary=told, evidence=evidence)
        elif agree and finding.check in _ANSWERED and finding.verdict == "distrust":
            more = "The figures are now those of stronger attacks, which agree."
            finding = replace(finding, verdict="warning", summary=f"{finding.summary} {more}")
        after.append(finding)
    return tuple(after)


def _not_asked(context: CheckContext) -> CheckResult:
    return CheckResult("ok", "No stronger attack was run: none was asked for.")


AGREEMENT = (Check(_NAME, "Do stronger attacks agree?", _not_asked, classification_only=True),)
