"""What models return: a tensor, or something that holds one."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from rai_toolbox.perturbations import worst_case
from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness.models._load import load_preprocess, logits_of

X = torch.linspace(-1, 1, 20)[:, None]
Y = X[:, 0] > 0
QUICK = {"epsilons": [0.5], "diagnostics": False, "steps": 5, "restarts": 1}


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda z: types.SimpleNamespace(logits=z, loss=None), None),
        (lambda z: {"logits": z}, None),
        (lambda z: {"scores": z, "other": 2 * z}, "scores"),
        (lambda z: (z, "features"), "0"),
        (lambda z: ["features", z], "-1"),
        (lambda z: types.SimpleNamespace(head=z), "head"),
    ],
)
def test_the_logits_are_found_in_what_a_model_returns(wrap: Any, output: Any) -> None:
    expected = evaluate(lambda x: 3 * x, (X, Y), **QUICK)
    found = evaluate(lambda x: wrap(3 * x), (X, Y), output=output, **QUICK)
    assert [p.value for p in found.curves["l2"].points] == [p.value for p in expected.curves["l2"].points]


def test_a_part_that_is_not_there_is_told_which_are() -> None:
    with pytest.raises(InputError, match=r"returned dict, expected a tensor of logits; its parts are a, b: name"):
        evaluate(lambda x: {"a": x, "b": x}, (X, Y), **QUICK)
    with pytest.raises(
        InputError, match=r"'7': what the model returned, tuple, has no such tensor; its parts are 0, 1"
    ):
        evaluate(lambda x: (x, x), (X, Y), output="7", **QUICK)
    with pytest.raises(InputError, match="has no such tensor"):
        evaluate(lambda x: x, (X, Y), output="logits", **QUICK)
    with pytest.raises(TypeError, match=r"lambda x: model\(x\)\.logits"):
        worst_case(lambda x: types.SimpleNamespace(logits=x), X, Y.long(), norm="l2", epsilon=0.1)


def test_outputs_of_transformers_are_taken_as_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.ImageClassifierOutput(logits=X)
    assert logits_of(output) is X


@pytest.mark.parametrize("name", ["imagenet", "cifar10"])
def test_statistics_of_known_data_sets_have_names(name: str) -> None:
    preprocess = load_preprocess(name)
    x = torch.full((2, 3, 4, 4), 0.5)
    assert preprocess(x).shape == x.shape
    assert preprocess(x).abs().max() < 1


@pytest.mark.parametrize(("inputs", "target"), [("image", "label"), ("pixel_values", "labels"), ("x", "y")])
def test_data_of_dicts(inputs: str, target: str) -> None:
    items = [{inputs: x, target: int(y), "id": 3} for x, y in zip(X, Y, strict=True)]
    expected = evaluate(lambda x: 3 * x, (X, Y), **QUICK)
    found = evaluate(lambda x: 3 * x, items, **QUICK)
    assert [p.value for p in found.curves["l2"].points] == [p.value for p in expected.curves["l2"].points]


def test_a_dict_without_an_input_is_told_what_is_looked_for() -> None:
    with pytest.raises(InputError, match=r"has the entries picture, label; expected one of x, pixel_values, image"):
        evaluate(lambda x: x, [{"picture": 1, "label": 0}] * 3, **QUICK)
