"""report.html: one file that needs nothing else, for a person to look at."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._results import Curve, Examples, Results
from rai_toolbox.robustness._text import shortened
from rai_toolbox.robustness.data._samples import kind_of
from rai_toolbox.robustness.report._pictures import (
    corruption_drawing,
    curve_drawing,
    data_uri,
    image_of,
    perturbation_of,
    series_path,
)

_GALLERY = 12
_TABLE_ROWS = 6

_LEGENDS = {
    "image": "In the middle: red pixels become larger, blue ones smaller, and the strongest color is the largest change"
    " of that picture. In color images gray is unchanged.",
    "series": "Solid: the original series. Dashed: the changed one.",
    "table": "The features that change most.",
}

NORM_NAMES = {
    "l2": "L2 (Euclidean length of the change)",
    "linf": "Linf (largest change of any one feature)",
    "l1": "L1 (sum of all changes)",
    "l0": "L0 (how many features change)",
}


def render_report(evaluation: Results) -> str:
    """Return the report of an evaluation as HTML."""
    return render(
        "report.html.j2",
        e=evaluation,
        headlines=_headlines(evaluation),
        sections=[_section(evaluation, norm) for norm in evaluation.curves],
        findings=sorted(evaluation.findings, key=lambda finding: _GRAVITY[finding.verdict]),
        verdict=verdict_of(evaluation),
        guidance=guidance(),
        kind=kind_of(evaluation.data["shape"], evaluation.feature_names),
        settings=_settings(evaluation),
        corruptions=corruption_drawing(evaluation),
    )


def render(template: str, **context: Any) -> str:
    """Fill a template; whatever comes from the user is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rai_toolbox.robustness.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    environment.filters["percent"] = percent
    environment.filters["shortened"] = shortened
    return environment.get_template(template).render(NORM_NAMES=NORM_NAMES, **context)


_GRAVITY = {"distrust": 0, "warning": 1, "not conclusive": 2, "not run": 3, "ok": 4}


@cache
def guidance() -> Mapping[str, str]:
    """Return the advice of trust.md as HTML, by the name of the check."""
    text = resources.files("rai_toolbox.robustness.checks").joinpath("trust.md").read_text("utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {heading.strip(): _markdown(body) for heading, _, body in (part.partition("\n") for part in sections)}


def _markdown(text: str) -> str:
    """Return paragraphs with `code` and **strong** words as HTML: all that trust.md uses."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    escaped = (html.escape(part, quote=False) for part in paragraphs)
    marked = (
        re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", re.sub(r"`(.+?)`", r"<code>\1</code>", part))
        for part in escaped
    )
    return "".join(f"<p>{part}</p>" for part in marked)


def percent(value: float) -> str:
    """Return a share as a person reads it."""
    return f"{100 * value:.1f}\u00a0%"


def figure(value: Any) -> str:
    """Return a number with four digits, anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return str(value)
    return f"{value:.4g}" if np.isfinite(value) else "none"


def verdict_of(evaluation: Results) -> tuple[str, str]:
    verdicts = [finding.verdict for finding in evaluation.findings]
    count = sum(verdict == "distrust" for verdict in verdicts)
    if count:
        return "distrust", f"Do not believe these figures: {_times(count, 'check')} of the evaluation failed."
    count = sum(verdict == "warning" for verdict in verdicts)
    if count:
        return (
            "warning",
            f"Read the warnings before you use these figures: there {'is' if count == 1 else 'are'}"
            f" {_times(count, 'warning')}.",
        )
    if "ok" not in verdicts:
        return "warning", "The evaluation itself was not checked."
    made = checks_made(evaluation)
    return "ok", f"{made[0].upper()}{made[1:]}."


def checks_made(evaluation: Results) -> str:
    """Return how many checks found no reason to doubt the figures, and which could not tell or were not made."""
    names = {
        verdict: [finding.check for finding in evaluation.findings if finding.verdict == verdict]
        for verdict in ("ok", "not conclusive", "not run")
    }
    if evaluation.findings and len(names["not run"]) == len(evaluation.findings):
        return "none was made"
    parts = [f"{_times(len(names['ok']), 'check')} found no reason to doubt these figures"] if names["ok"] else []
    parts += [f"{verdict}: {', '.join(names[verdict])}" for verdict in ("not conclusive", "not run") if names[verdict]]
    return "; ".join(parts) or "each has raised something"


def _times(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _headlines(evaluation: Results) -> list[tuple[str, str, str]]:
    """Return the figures to show first: what, value, and how sure."""
    accuracy = evaluation.task == "classification"
    first = next(iter(evaluation.curves.values()))
    clean = first.points[0]
    shown = percent if accuracy else figure
    lines = [
        (
            "Accuracy, unperturbed" if accuracy else "Mean absolute error, unperturbed",
            shown(clean.value),
            f"95 % interval {shown(clean.low)} to {shown(clean.high)}",
        )
    ]
    for norm, curve in evaluation.curves.items():
        if accuracy:
            if curve.median_distance is not None:
                lines.append(
                    (
                        f"Median distance to an error ({norm})",
                        figure(curve.median_distance),
                        "half of the samples that are right can be made wrong with less",
                    )
                )
            middle = min(curve.points[1:], key=lambda point: abs(point.value - clean.value / 2))
        else:
            middle = curve.points[len(curve.points) // 2]
        lines.append(
            (
                f"{'Accuracy' if accuracy else 'Error'} at ε\u00a0=\u00a0{middle.epsilon:g} ({norm})",
                shown(middle.value),
                f"95 % interval {shown(middle.low)} to {shown(middle.high)}",
            )
        )
    return lines


def _section(evaluation: Results, norm: str) -> dict[str, Any]:
    curve = evaluation.curves[norm]
    return {
        "norm": norm,
        "curve": curve,
        "columns": _columns(evaluation, curve),
        "drawing": curve_drawing({"": evaluation}, norm),
        "sentence": _sentence(evaluation, curve),
        "concerned": _concerned(evaluation, norm),
        "rates": norm in evaluation.error_rate,
        "found_by": _found_by(evaluation, norm),
        "gallery": _gallery(evaluation, norm) if norm in evaluation.examples else [],
        "legend": _LEGENDS[kind_of(evaluation.data["shape"], evaluation.feature_names)],
    }


def _rates(evaluation: Results, norm: str) -> list[tuple[str, list[str]]]:
    """Return, of a random model, the mean rate of errors at each point, and how many intervals hold one half."""
    rates = evaluation.error_rate.get(norm)
    if rates is None:
        return []
    held = ((rates[..., 1] < 0.5) & (rates[..., 2] >= 0.5)).sum(axis=1)
    known = [row[~np.isnan(row)] for row in rates[..., 0]]
    means = [percent(float(row.mean())) if len(row) else "none" for row in known]
    return [("Errors at the worst points, mean", means), ("Not shown either way", list(map(str, held.tolist())))]


def _found_by(evaluation: Results, norm: str) -> str:
    """Return which attacks found how many of the errors."""
    names = evaluation.found_by.get(norm)
    if names is None:
        return ""
    accuracy = evaluation.task == "classification"
    counts = Counter(name for name in (names if accuracy else names[-1]).tolist() if name)
    found = ", ".join(f"{count} by {name}" for name, count in counts.most_common()) or "none"
    what = "The nearest error of a sample was found" if accuracy else "At the largest ε the worst change was found"
    return f"{what}: {found}."


def _columns(evaluation: Results, curve: Curve) -> list[tuple[str, list[str]]]:
    """Return the columns of the table below a curve, beside that of the radii: heading and cells."""
    points, accuracy = curve.points, evaluation.task == "classification"
    shown = percent if accuracy else figure
    columns = [
        (evaluation.measure.capitalize(), [shown(point.value) for point in points]),
        ("95 % interval", [f"{shown(point.low)} to {shown(point.high)}" for point in points]),
    ]
    if accuracy:
        columns.append(("Minimum-norm search alone", [percent(point.by_minimum_norm or 0.0) for point in points]))
        for what in ("earlier_points", "fixed_budget", "stronger_attacks"):
            counts = [getattr(point, f"also_by_{what}") for point in points]
            if any(counts) or what == "fixed_budget":
                columns.append((f"Broken by {what.replace('_', ' ')} only", list(map(str, counts))))
    columns += _rates(evaluation, curve.norm)
    if curve.average:
        cells = [f"{shown(mean.error)} ({shown(mean.low)} to {shown(mean.high)})" for mean in curve.average]
        columns.append(("Error at random points", cells))
    return columns


def _concerned(evaluation: Results, norm: str) -> tuple[str, str] | None:
    """Return the gravest verdict on a curve, and the checks that say so: those of other curves are left out."""
    for verdict, words in (("distrust", "Do not trust this curve"), ("warning", "Read these warnings first")):
        checks = [finding.check for finding in evaluation.findings if finding.verdict == verdict]
        others = [f"({other})" for other in evaluation.curves if other != norm]
        summaries = {finding.check: finding.summary for finding in evaluation.findings}
        checks = [check for check in checks if not any(other in summaries[check] for other in others)]
        if checks:
            return verdict, f"{words}: {', '.join(checks)}."
    return None


def _sentence(evaluation: Results, curve: Curve) -> str:
    if evaluation.task == "regression":
        last = curve.points[-1]
        return (
            f"Without any change the predictions are off by {figure(curve.points[0].value)} on average; changes within"
            f" ε = {last.epsilon:g} can raise that to {figure(last.value)}."
        )
    clean = curve.points[0]
    middle = min(curve.points[1:], key=lambda point: abs(point.value - clean.value / 2))
    boundless = curve.norm == "l0" and evaluation.settings["bounds"]["lower"] is None
    return (
        f"{percent(clean.value)} of {clean.samples} samples are classified right as they are."
        f" {percent(middle.value)} stay right under every"
        f" change within ε = {middle.epsilon:g} that was tried; for the others a change that small makes the"
        " model wrong." + (" There are no bounds: a feature that changes may take any value." if boundless else "")
    )


def _gallery(evaluation: Results, norm: str) -> list[dict[str, Any]]:
    examples, points = evaluation.examples[norm], evaluation.curves[norm].points
    shown = list(range(len(examples.index)))
    if evaluation.task == "regression":  # one of each sample, at the radius in the middle, where there are more
        largest = points[1 + (len(points) - 1) // 2].epsilon
        within = [position for position in shown if examples.distance[position] <= largest * (1 + 1e-9)]
        shown = sorted({int(examples.index[position]): position for position in within}.values())
    chosen = np.unique(np.linspace(0, len(shown) - 1, min(_GALLERY, len(shown))).round().astype(int))
    return [_example(evaluation, examples, shown[position]) for position in chosen.tolist()]


def _example(evaluation: Results, examples: Examples, position: int) -> dict[str, Any]:
    original, perturbed = examples.original[position], examples.perturbed[position]
    index = int(examples.index[position])
    row = int(np.flatnonzero(evaluation.index == index)[0])
    names = evaluation.class_names

    def named(answer: Any) -> str:
        if evaluation.task == "regression":
            return ", ".join(figure(value) for value in np.atleast_1d(answer)[:4])
        return shortened(names[int(answer)]) if 0 <= int(answer) < len(names) else str(answer)

    entry: dict[str, Any] = {
        "index": index,
        "distance": float(examples.distance[position]),
        "label": named(evaluation.label[row]),
        "before": named(evaluation.prediction[row]),
        "after": named(examples.prediction[position]),
    }
    low, high = _display_range(evaluation)
    kind = kind_of(original.shape, evaluation.feature_names)
    if kind == "image":
        delta = perturbed - original
        entry["images"] = [
            ("original", data_uri(image_of(original, low, high))),
            ("change", data_uri(perturbation_of(delta))),
            ("perturbed", data_uri(image_of(perturbed, low, high))),
        ]
        entry["largest"] = float(np.abs(delta).max())
    elif kind == "series":
        first, second = original.reshape(-1, original.shape[-1]), perturbed.reshape(-1, perturbed.shape[-1])
        bottom, top = float(min(first.min(), second.min())), float(max(first.max(), second.max()))
        entry["series"] = [
            (series_path(a, bottom, top, 300, 90), series_path(b, bottom, top, 300, 90))
            for a, b in zip(first[:3], second[:3], strict=True)
        ]
    else:
        entry["changes"] = _changes(original.reshape(-1), perturbed.reshape(-1), evaluation.feature_names)
    return entry


def _display_range(evaluation: Results) -> tuple[float, float]:
    box = evaluation.settings["bounds"]
    low, high = box["lower"], box["upper"]
    if isinstance(low, float) and isinstance(high, float) and np.isfinite(low) and np.isfinite(high):
        return low, high
    return evaluation.data["minimum"], evaluation.data["maximum"]


def _changes(original: NDArray, perturbed: NDArray, names: Sequence[str] | None) -> list[tuple[str, float, float]]:
    """Return the features that change most."""
    order = np.argsort(-np.abs(perturbed - original), kind="stable")[:_TABLE_ROWS]
    called = list(names or ()) + [f"feature {i}" for i in range(len(names or ()), len(original))]
    return [(called[i], float(original[i]), float(perturbed[i])) for i in order.tolist() if perturbed[i] != original[i]]


def _settings(evaluation: Results) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in (*evaluation.settings.items(), *evaluation.environment.items()):
        if name == "extra_epsilons" and not value:
            continue
        lines.append((name.replace("_", " "), _words(value)))
    return lines


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{key} {_words(entry)}" for key, entry in value.items() if key != "movable")
            or "chosen from the data"
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(entry) for entry in value) if len(value) <= 16 else f"{len(value)} values"
    return "default" if value is None else figure(value)
