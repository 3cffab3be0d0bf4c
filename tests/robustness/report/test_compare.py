"""Evaluations side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.robustness import InputError, compare, evaluate

QUICK = {"steps": 10, "restarts": 1, "diagnostics": False, "epsilons": [0.25, 0.5]}


@pytest.fixture
def tilted():
    """A worse classifier of `blobs`: its boundary is off by a quarter."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        model.bias.copy_(torch.tensor([0.25, -0.25]))
    return model


def test_counts_are_of_the_samples_on_which_they_differ(half_plane, tilted, blobs, tmp_path):
    good = evaluate(half_plane, blobs, **QUICK, described={"model": "good"})
    bad = evaluate(tilted, blobs, **QUICK, described={"model": "bad"})
    both = compare(good, bad)
    assert both.names == ("good", "bad")
    for point in both.norms["l2"]:
        first, second = good.distance["l2"] > point.epsilon, bad.distance["l2"] > point.epsilon
        assert point.test.only_first == int((first & ~second).sum())
        assert point.test.only_second == int((second & ~first).sum())
    assert both.norms["l2"][0].test.only_first == 5
    both.save(tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["names"] == ["good", "bad"]
    assert content["schema_version"] == 2
    rows = (tmp_path / "comparison.csv").read_text().splitlines()
    assert rows[0] == "norm,epsilon,good,bad,only_first,only_second,p_value"
    assert len(rows) == 1 + len(content["norms"]["l2"])
    assert rows[1].split(",")[4:] == ["5", "0", str(content["norms"]["l2"][0]["tests"][0]["p_value"])]
    page = (tmp_path / "comparison.html").read_text()
    assert "good" in page
    assert page.count("<polyline") == 2


def test_more_than_two_are_each_compared_with_the_first(half_plane, tilted, blobs, tmp_path):
    models = {"good": half_plane, "bad": tilted, "again": half_plane, "4": tilted}
    results = [evaluate(net, blobs, **QUICK, described={"model": name}) for name, net in models.items()]
    together = compare(*results)
    assert together.names == tuple(models)
    for other in (1, 2, 3):
        pair = compare(results[0], results[other])
        for all_of_them, two in zip(together.norms["l2"], pair.norms["l2"], strict=True):
            assert all_of_them.tests[other - 1] == two.test
            assert (all_of_them.first, all_of_them.accuracies[other]) == (two.first, two.second)
            assert all_of_them.intervals[other] == two.intervals[1]
    together.save(tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    assert page.count("<polyline") == 4
    assert "good, bad, again and 4" in page
    header, first, *_ = (tmp_path / "comparison.csv").read_text().splitlines()
    assert header.startswith(
        "norm,epsilon,good,bad,again,4,only_first (bad),only_it (bad),p_value (bad),only_first (again)"
    )
    assert header.count(",") == first.count(",")


def test_models_of_one_name_are_told_apart(half_plane, blobs, tmp_path):
    one = evaluate(half_plane, blobs, **QUICK, described={"model": "same"})
    folders = [one.save(tmp_path / name) for name in "abcd"]
    assert compare(*folders).names == tuple(map(str, folders))
    assert compare(one, one, one, one).names == ("first", "second", "third", "number 4")
    with pytest.raises(InputError, match="'third' were evaluated on different samples"):
        compare(one, one, evaluate(half_plane, (blobs[0][:8], blobs[1][:8]), **QUICK, described={"model": "same"}))


def test_names_are_escaped(half_plane, tilted, blobs, tmp_path):
    hostile = "<script>alert('x')</script>"
    named = [evaluate(net, blobs, **QUICK, described={"model": f"{net.bias}{hostile}"}) for net in (half_plane, tilted)]
    text = (compare(*named).save(tmp_path) / "comparison.html").read_text()
    assert hostile not in text
    assert "&lt;script&gt;" in text


def test_a_model_beside_itself_differs_nowhere(half_plane, blobs):
    one = evaluate(half_plane, blobs, **QUICK)
    assert all(point.test.p_value == 1.0 for point in compare(one, one).norms["l2"])


def test_other_samples_other_norms_and_regressions_are_refused(half_plane, blobs, tmp_path):
    x, y = blobs
    one = evaluate(half_plane, blobs, **QUICK)
    with pytest.raises(InputError, match="different samples"):
        compare(one, evaluate(half_plane, (x + np.float32(0.01), y), **QUICK))
    with pytest.raises(InputError, match="no norm"):
        compare(one, evaluate(half_plane, blobs, norms="linf", **QUICK))
    with pytest.raises(InputError, match="cannot read"):
        compare(one, tmp_path / "nothing")
    (tmp_path / "results.json").write_text('{"schema": "other"}')
    with pytest.raises(InputError, match=r"not a results\.json"):
        compare(one, tmp_path)
