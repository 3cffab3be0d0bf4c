"""--junit FILE: a JUnit XML report, one case for each threshold and each check, for CI systems."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._results import Finding
from rai_toolbox.robustness.command._thresholds import Held
from rai_toolbox.robustness.report._evaluation import Evaluation

_NAME = "rai-toolbox"


def check_junit_file(word: str) -> Path:
    """Return the path that a JUnit report is to have, before any figure is computed for it.

    Raises InputError if no file can be written there.
    """
    path = Path(word)
    if not word.strip() or path.is_dir():
        raise InputError(f"--junit {word!r}: expected the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--junit {word!r}: the folder {str(path.parent)!r} cannot be written to: {reason}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"--junit {word!r} cannot be written: it is read-only")
    return path


def junit_xml(evaluation: Evaluation, thresholds: Sequence[Held], *, strict: bool) -> str:
    """Return the report as XML.

    A threshold that is not met, and a check that distrusts the figures, is a failure. A check that was not run is
    skipped; with `strict`, one that applies and could not be made is an error.
    """
    root = Xml.Element("testsuites", name=_NAME, time=f"{evaluation.timings.get('total', 0):.3f}")
    suites = {"thresholds": [_threshold(one) for one in thresholds]}
    suites["checks"] = [_check(finding, strict=strict) for finding in evaluation.findings]
    for name, cases in suites.items():
        suite = Xml.SubElement(root, "testsuite", {"name": f"{_NAME}.{name}", **_counts(cases)})
        properties = Xml.SubElement(suite, "properties")
        for key, value in _properties(evaluation).items():
            Xml.SubElement(properties, "property", name=key, value=_clean(value))
        for case in cases:
            case.set("classname", f"{_NAME}.{name}")
            suite.append(case)
    for key, value in _counts([case for cases in suites.values() for case in cases]).items():
        root.set(key, value)
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _counts(cases: Sequence[Xml.Element]) -> dict[str, str]:
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    found = {name: sum(case.find(tag) is not None for case in cases) for name, tag in kinds.items()}
    return {name: str(count) for name, count in {"tests": len(cases), **found}.items()}


def _properties(evaluation: Evaluation) -> dict[str, str]:
    settings = evaluation.settings
    chosen = {name: str(settings[name]) for name in ("model", "data", "seed") if name in settings}
    evidence = {f"evidence of {one.figures}": f"{one.kind} ({one.gives})" for one in evaluation.evidence}
    return chosen | {"complete": str(evaluation.complete), "trusted": str(evaluation.trusted)} | evidence


def _threshold(one: Held) -> Xml.Element:
    threshold, point = one.threshold, one.point
    case = Xml.Element("testcase", name=_clean(threshold.word), time="0")
    text = f"accuracy under attack at least {threshold.accuracy:g} at {threshold.norm}:{threshold.epsilon:g}\n"
    if point is None:
        text += "found: nothing, the time limit came first\n"
    else:
        text += (
            f"found: {point.value:.6g}, 95 % interval {point.low:.6g} to {point.high:.6g}, of {point.samples} samples\n"
            "kind of evidence: attack (upper bound on the robust accuracy)\n"
        )
    return _with(case, "failure" if one.reason else None, one.reason or "", text)


def _check(finding: Finding, *, strict: bool) -> Xml.Element:
    case = Xml.Element("testcase", name=finding.check, time="0")
    lines = [finding.title, f"verdict: {finding.verdict}", finding.summary]
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in finding.evidence.items()]
    kind = {"distrust": "failure", "not run": "skipped"}.get(finding.verdict)
    if strict and finding.evidence.get("could_not_be_made"):
        kind = "error"
    return _with(case, kind, finding.summary, "\n".join(lines) + "\n")


def _with(case: Xml.Element, kind: str | None, message: str, text: str) -> Xml.Element:
    """Return a case with its outcome, and its evidence as text."""
    if kind is not None:
        outcome = Xml.SubElement(case, kind, message=_clean(message))
        if kind != "skipped":
            outcome.set("type", kind)
            outcome.text = _clean(text)
    Xml.SubElement(case, "system-out").text = _clean(text)
    return case


def _clean(text: str) -> str:
    """Return a text without the characters that XML 1.0 has no way to write."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else " " for letter in text)
