"""Labels of named classes, in the order of a model's outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.robustness import InputError, evaluate, load_data
from rai_toolbox.robustness.run import _run


def folders(place, *names):
    from PIL import Image

    for number, name in enumerate(names):
        (place / name).mkdir(parents=True)
        Image.new("L", (4, 4), 10 + 40 * number).save(place / name / "0.png")
    return str(place)


def outputs(count):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, count))


def labels_of(data, count, **options):
    result = evaluate(outputs(count), data, epsilons=[0.1], steps=1, restarts=1, diagnostics=False, **options)
    return result.label.tolist(), result.class_names


def test_numbers_as_names_of_folders_are_the_labels_where_the_model_has_such_outputs(tmp_path):
    data = load_data(folders(tmp_path, "3", "15", "40"))
    assert labels_of(data, 41)[0] == [15, 3, 40]
    # A model with fewer outputs: they are names, in their order as numbers.
    labels, names = labels_of(data, 3)
    assert sorted(labels) == [0, 1, 2]
    assert names == ("3", "15", "40")
    with pytest.raises(InputError, match="the label of sample 2 is 40"):
        labels_of(data, 2)


@pytest.mark.parametrize("names", [("cat", "7"), ("1", "01")])
def test_other_names_are_numbered_in_their_order(tmp_path, names):
    data = load_data(folders(tmp_path, *names))
    assert data.targets.tolist() == [0, 1]
    assert data.class_names == tuple(sorted(names))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "owl\nfox\n\ncat\n"),
        ("names.json", json.dumps(["owl", "fox", "cat"])),
        ("names.json", json.dumps({"cat": 2, "owl": 0, "fox": 1})),
        ("names.json", json.dumps({"0": ["n1", "owl"], "1": ["n2", "fox"], "2": ["n3", "cat"]})),
    ],
)
def test_a_file_of_classes_numbers_the_folders(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    data = load_data(folders(tmp_path / "d", "cat", "owl"))
    labels, names = labels_of(data, 3, classes=tmp_path / file)
    assert labels == [2, 0]
    assert names == ("owl", "fox", "cat")


def test_classes_that_do_not_fit_are_refused(tmp_path):
    data = load_data(folders(tmp_path / "d", "cat", "owl"))
    with pytest.raises(InputError, match="has no class 'cat', as the data have; did you mean 'cats'"):
        labels_of(data, 3, classes=["cats", "owl"])
    with pytest.raises(InputError, match="names 'owl' twice"):
        labels_of(data, 3, classes=["owl", "owl", "cat"])
    with pytest.raises(InputError, match="cannot read"):
        labels_of(data, 3, classes=str(tmp_path / "missing.txt"))
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(InputError, match="expected one name a line"):
        labels_of(data, 3, classes=tmp_path / "bad.json")


def test_classes_name_labels_that_have_no_names():
    x = np.zeros((2, 1, 4, 4), np.float32)
    labels, names = labels_of((x, [1, 0]), 2, classes=["no", "yes"])
    assert labels == [1, 0]
    assert names == ("no", "yes")


def data_fit(model, x, y, **options):
    result = evaluate(model, (x, y), epsilons=[0.1], steps=1, restarts=1, **options)
    return next(finding for finding in result.findings if finding.check == "data-fit")


def test_few_classes_before_many_outputs_and_images_beyond_the_range_are_warned_of(monkeypatch):
    monkeypatch.setattr(_run, "CHECKS", [check for check in _run.CHECKS if check.name == "data-fit"])
    x, y = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32), np.arange(6) % 3
    assert data_fit(outputs(3), x, y).verdict == "ok"
    assert "[0, 1]" in data_fit(outputs(3), x, y).summary
    found = data_fit(outputs(40), x, y)
    assert found.verdict == "warning"
    assert "0 to 2 before a model of 40 outputs" in found.summary
    assert data_fit(outputs(40), x, np.arange(6) * 7).verdict == "ok"
    found = data_fit(outputs(3), 255 * x, y)
    assert found.verdict == "warning"
    assert "no bounds were applied" in found.summary
    assert data_fit(outputs(3), 255 * x, y, bounds=(0, 255)).verdict == "ok"
    assert data_fit(outputs(3), 255 * x, y, bounds=None).verdict == "ok"
