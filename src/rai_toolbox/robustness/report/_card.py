"""card.md: a model card, its figures as rows that model hubs read (`model-index`), for a person and for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rai_toolbox.robustness._results import Results
from rai_toolbox.robustness.data._samples import kind_of
from rai_toolbox.robustness.report._report import NORM_NAMES, figure, percent, verdict_of

_TASKS = {"image": "image", "series": "time-series", "table": "tabular"}


def render_card(evaluation: Results) -> str:
    """Return the model card of an evaluation as Markdown with a YAML head."""
    parts = [
        _head(evaluation),
        f"# Robustness of {_code(_name(evaluation))}",
        f"Measured by rai-toolbox {evaluation.environment.get('rai_toolbox', '')} on"
        f" {evaluation.data['evaluated']} samples of {_code(_data(evaluation))}. This card was written by the"
        " evaluation; `results.json` beside it has every figure.",
        f"**{verdict_of(evaluation)[1]}**",
    ]
    if not evaluation.complete:
        parts.append("**A partial result: the time limit ended the run before all was done.**")
    parts += ["## Figures", *_figures(evaluation)]
    kinds = [f"`{one.figures}`: {one.kind} ({one.gives}). {one.meaning}" for one in evaluation.evidence]
    parts += ["## Kinds of evidence", _list([*kinds, "No figure is a proof, and no figure is certified."])]
    parts += ["## Threat model", _list(_threat_model(evaluation))]
    parts += ["## What was not tested", _list(_not_tested(evaluation))]
    if evaluation.findings:
        rows = [(f"`{one.check}`", one.verdict, one.summary) for one in evaluation.findings]
        parts += ["## Checks of the evaluation itself", _table(("check", "verdict", "summary"), rows)]
    return "\n\n".join(parts) + "\n"


def _name(evaluation: Results) -> str:
    return str(evaluation.settings.get("model", "the model"))


def _data(evaluation: Results) -> str:
    return str(evaluation.settings.get("data", "the data"))


def _head(evaluation: Results) -> str:
    """Return the YAML head: the schema of `model-index`, one row per figure."""
    kind = _TASKS[kind_of(evaluation.data["shape"], evaluation.feature_names)]
    dataset: dict[str, Any] = {"name": _data(evaluation), "type": _data(evaluation)}
    dataset["args"] = {"fingerprint": evaluation.data["fingerprint"]}
    lines = [
        "---",
        "model-index:",
        f"- name: {_yaml(_name(evaluation))}",
        "  results:",
        f"  - task: {_yaml({'type': f'{kind}-{evaluation.task}'})}",
        f"    dataset: {_yaml(dataset)}",
        "    metrics:",
        *(f"    - {_yaml(row)}" for row in _rows(evaluation)),
        "---",
    ]
    return "\n".join(lines)


def _rows(evaluation: Results) -> Iterator[dict[str, Any]]:
    accuracy = evaluation.task == "classification"
    measure = "accuracy" if accuracy else "mean absolute error"
    short = "accuracy" if accuracy else "mae"
    first = next(iter(evaluation.curves.values())).points[0]
    yield _row(short, f"{measure}, unperturbed", first.value, first.low, first.high, first.samples, {})
    for norm, curve in evaluation.curves.items():
        for point in curve.points[1:]:
            where = {"norm": norm, "epsilon": point.epsilon}
            name = f"{measure} under attack, {norm} epsilon {point.epsilon:g} ({evaluation.evidence[0].gives})"
            where["evidence"] = "attack"
            yield _row(f"robust-{short}", name, point.value, point.low, point.high, point.samples, where)
        for mean in curve.average[1:]:
            where = {"norm": norm, "epsilon": mean.epsilon, "evidence": "average"}
            what = "error rate" if accuracy else measure
            name = f"{what} at random points, {norm} epsilon {mean.epsilon:g} (average)"
            yield _row("error-rate" if accuracy else short, name, mean.error, mean.low, mean.high, mean.points, where)
    for corruption in evaluation.corruptions.values():
        for one in corruption.points[1:]:
            where = {"corruption": corruption.name, "severity": one.severity, "evidence": "average"}
            name = f"{measure} under {corruption.name}, severity {one.severity:g} (average)"
            yield _row(short, name, one.value, one.low, one.high, one.samples, where)


def _row(
    kind: str, name: str, value: float, low: float, high: float, count: int, where: Mapping[str, Any]
) -> dict[str, Any]:
    details = {**where, "low": low, "high": high, "confidence": 0.95, "count": count}
    return {"type": kind, "name": name, "value": value, "args": details}


def _figures(evaluation: Results) -> Iterator[str]:
    accuracy = evaluation.task == "classification"
    shown = percent if accuracy else figure
    for norm, curve in evaluation.curves.items():
        head = ["ε", f"{evaluation.measure} under attack", "95 % interval"]
        head += ["error at random points", "95 % interval"] if curve.average else []
        rows = []
        for level, point in enumerate(curve.points):
            row = [f"{point.epsilon:g}", shown(point.value), f"{shown(point.low)} to {shown(point.high)}"]
            if curve.average:
                mean = curve.average[level]
                row += [shown(mean.error), f"{shown(mean.low)} to {shown(mean.high)}"]
            rows.append(row)
        yield f"Changes measured in {NORM_NAMES[norm]}:"
        yield _table(head, rows)
    for corruption in evaluation.corruptions.values():
        yield f"Under the corruption {_code(corruption.name)}:"
        rows = [
            (f"{one.severity:g}", shown(one.value), f"{shown(one.low)} to {shown(one.high)}")
            for one in corruption.points
        ]
        yield _table(("severity", evaluation.measure, "95 % interval"), rows)


def _threat_model(evaluation: Results) -> Iterator[str]:
    settings, box = evaluation.settings, evaluation.settings["bounds"]
    accuracy = evaluation.task == "classification"
    yield "Goal: any wrong answer (untargeted)." if accuracy else "Goal: the largest mean absolute error."
    yield "Knowledge: all of the model, its gradient too, and as many answers of it as wanted (white box)."
    for norm, curve in evaluation.curves.items():
        yield f"Capability: a change of an input of at most ε = {curve.points[-1].epsilon:g} in {NORM_NAMES[norm]}."
    bounds = [box[end] for end in ("lower", "upper")]
    if bounds == [None, None]:
        yield "Bounds: none; a changed input may take any value."
    elif any(isinstance(end, list) for end in bounds):
        yield "Bounds: one per feature, in `results.json`."
    else:
        yield f"Bounds: changed inputs stay in [{figure(bounds[0])}, {figure(bounds[1])}] ({box['chosen']})."
    if box["frozen_features"]:
        yield f"Entries that may not change: {box['frozen_features']}."
    steps, restarts = (settings[name] or "the default number of" for name in ("steps", "restarts"))
    yield f"Attacks: {'a minimum-norm search, then ' if accuracy else ''}a search at each ε; {steps} steps,\
 {restarts} restarts."


def _not_tested(evaluation: Results) -> Iterator[str]:
    others = [norm for norm in NORM_NAMES if norm not in evaluation.curves]
    if others:
        yield f"Changes that are small in another norm: {', '.join(others)}."
    yield "Larger changes than those of the tables."
    yield "Changes of another kind: rotations, patches, other lighting, another camera, physical objects."
    if evaluation.corruptions:
        yield "Corruptions other than those of the tables, and other severities."
    else:
        yield "Corruptions: none was given."
    if evaluation.task == "classification":
        yield "Targeted attacks, which ask for one wrong class."
    yield "Data other than these samples: the intervals are about the population from which these samples were drawn."
    yield "Attacks on training: poisoned data, backdoors. Attacks on secrecy: copies of the model, traces of its data."
    yield "A proof (formal verification): attacks and random points can show errors, not their absence."
    if evaluation.data["evaluated"] < evaluation.data["samples"] or not evaluation.complete:
        rest = evaluation.data["samples"] - evaluation.data["evaluated"]
        yield f"What the time limit left out: {rest} samples were not reached, and others not by every attack."
    if not evaluation.findings:
        yield "The evaluation itself: its checks were not run."


def _list(lines: Iterator[str] | list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Any, rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return _printable(text).replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """Return a text of the user's as code on one line: nothing in it is Markdown or HTML."""
    text = " ".join(_printable(text).replace("`", "'").split())
    return f"`{text or ' '}`"


def _printable(text: str) -> str:
    """Return a text without what neither YAML nor a page may hold, such as control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(_printable(value), ensure_ascii=False)
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".inf" if value > 0 else "-.inf"
        mantissa, e, exponent = repr(value).partition("e")
        # 1e-05 would be a text in YAML 1.1.
        return f"{mantissa}{'' if '.' in mantissa or not e else '.0'}{e}{exponent}"
    return json.dumps(value)
