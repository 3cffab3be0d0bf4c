"""card.md: its figures are those of the result, as the tools of a model hub read them, and it claims no more."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from rai_toolbox.robustness import Evaluation, Finding, evaluate
from rai_toolbox.robustness.report._card import render_card

QUICK = {"steps": 3, "restarts": 1, "diagnostics": False}


def dimmed(x, severity):
    return x / severity


@pytest.fixture(scope="module")
def results():
    x = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    options = {"corruptions": [dimmed], "severities": [2], "described": {"model": "m", "data": "d"}, **QUICK}
    yes = evaluate(
        lambda v: 3 * v, (x, (x[:, 0] > 0).astype(int)), epsilons=[1e-5, 0.5], norms=["l2", "linf"], bounds=(-2, 2),
        **options,
    )  # fmt: skip
    return {
        "classification": yes,
        "regression": evaluate(lambda v: 3 * v, (x, 3 * x[:, 0]), epsilons=[0.5], task="regression", **options),
    }


def rows(text):
    """The rows of `model-index`, by type and place, as the hub's own library reads them."""
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which transformers brings")
    card = hub.ModelCard(text, ignore_metadata_errors=False)
    found = {}
    for row in card.data.eval_results:
        args = row.metric_args
        place = args.get("norm") or args.get("corruption"), args.get("epsilon", args.get("severity"))
        found[(row.metric_type, *place)] = row
        assert row.dataset_name == "d"
    return found


def test_every_figure_is_a_row_of_model_index(results):
    result = results["classification"]
    found = rows(render_card(result))
    assert found[("accuracy", None, None)].metric_value == result.curves["l2"].points[0].value
    count = 1
    for norm, curve in result.curves.items():
        for point, mean in zip(curve.points[1:], curve.average[1:], strict=True):
            worst = found[("robust-accuracy", norm, point.epsilon)]
            assert worst.metric_value == point.value
            assert worst.metric_args["low"] == point.low
            assert worst.metric_args["evidence"] == "attack"
            assert "upper bound" in worst.metric_name
            average = found[("error-rate", norm, point.epsilon)]
            assert (average.metric_value, average.metric_args["high"]) == (mean.error, mean.high)
            assert average.metric_args["evidence"] == "average"
            count += 2
    point = result.corruptions["dimmed"].points[1]
    assert found[("accuracy", "dimmed", 2)].metric_value == point.value
    assert len(found) == count + 1
    errors = rows(render_card(results["regression"]))
    assert errors[("robust-mae", "l2", 0.5)].metric_value == results["regression"].curves["l2"].at(0.5).value


def test_the_card_says_what_was_not_tested_and_that_nothing_is_proved(results):
    text = render_card(results["classification"])
    missing = text.partition("## What was not tested")[2]
    for words in ("another norm: l1, l0", "Larger changes", "Targeted attacks", "proof", "its checks were not run"):
        assert words in missing
    threats = text.partition("## Threat model")[2].partition("##")[0]
    for words in ("white box", "untargeted", "at most ε = 0.5 in L2", "stay in [-2, 2]"):
        assert words in threats
    assert "no figure is certified" in text
    assert "The evaluation itself was not checked" in text
    distrusted = Evaluation(
        **vars(results["classification"]) | {"findings": (Finding("a", "A", "distrust", "No."),), "complete": False}
    )
    card = render_card(distrusted)
    assert "**Do not believe these figures: 1 check of the evaluation failed.**" in card
    assert "A partial result" in card
    assert "| `a` | distrust | No. |" in card


def test_no_text_of_ours_says_that_a_regulation_is_passed(results, tmp_path):
    results["classification"].save(tmp_path)
    texts = [(tmp_path / name).read_text("utf-8") for name in ("card.md", "report.html", "results.json")]
    for text in texts:
        assert not re.search(r"\b(compl(y|ies|iant|iance)|conform\w*|certified (for|as|by)|24029|AI Act)\b", text)


@pytest.mark.parametrize(
    "name", ["a: b # c\n- d", '"quoted"\\', "\x00\x7f\x85\ud800", "`code` | <script>", "🦊 ", "yes"]
)
def test_a_name_of_any_letters_leaves_the_card_readable(results, name):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which transformers brings")
    result = results["classification"]
    named = replace(result, settings=result.settings | {"model": name}, findings=())
    text = render_card(named)
    text.encode("utf-8")
    card = hub.ModelCard(text, ignore_metadata_errors=False)
    expected = "".join(letter if letter.isprintable() else " " for letter in name)
    assert card.data.model_name == expected
    body = text.partition("\n---\n")[2]
    assert "\n- d" not in body.partition("## Figures")[0]
    assert "<script>" not in re.sub(r"`[^`]*`", "", body)
