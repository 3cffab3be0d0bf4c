"""What a result holds and writes, what a time limit leaves of it, and what another run may go on with."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest
from torch import nn

from rai_toolbox.robustness import Evaluation, EvaluationFailed, InputError, evaluate

QUICK = {"steps": 10, "restarts": 1, "diagnostics": False}


def figures(evaluation):
    """Everything in results.json but what may differ from run to run."""
    content = evaluation.to_dict()
    return {key: value for key, value in content.items() if key not in ("timings", "environment")}


def test_results_come_back_from_disk_as_they_were(small_net, digits, tmp_path):
    x, y = digits
    result = evaluate(small_net, (x[:20], y[:20]), steps=5, restarts=1)
    result.save(tmp_path)
    again = Evaluation.load(tmp_path)
    assert again.to_dict() == result.to_dict()
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["schema_version"] == 3
    frame = result.to_pandas()
    assert list(frame.columns) == ["label", "prediction", "correct", "distance_l2", "found_by_l2"]
    assert len(frame) == 20


def as_read(values):
    """Older versions of pandas read the last digit otherwise."""
    return pytest.approx(values, rel=1e-14)


def test_every_figure_of_the_json_is_in_the_csv_too(small_net, digits, tmp_path):
    import pandas as pd

    x, y = digits
    result = evaluate(small_net, (x[:20], y[:20]), norms=["l2", "linf"], **QUICK)
    result.save(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    curve, classes = (pd.read_csv(tmp_path / name) for name in ("curve.csv", "classes.csv"))
    for norm, content in written["curves"].items():
        table = curve[curve["norm"] == norm]
        for column, key in (("accuracy", "value"), *((key, key) for key in content["points"][0] if key != "value")):
            assert table[column].tolist() == as_read([point[key] for point in content["points"]])
        for row in content["classes"]:
            part = classes[(classes["norm"] == norm) & (classes["label"] == row["label"])]
            assert part["accuracy"].tolist() == row["values"]
            assert set(part["samples"]) == {row["samples"]}
        # What the classes say, weighted, is what the curve says.
        for level, point in enumerate(content["points"]):
            right = sum(row["samples"] * row["values"][level] for row in content["classes"])
            assert right / 20 == pytest.approx(point["value"])
    samples = pd.read_csv(tmp_path / "samples.csv")
    for column in ("index", "label", "prediction", "correct"):
        assert samples[column].tolist() == written["samples"][column]
    for norm, distances in written["samples"]["distance"].items():
        assert samples[f"distance_{norm}"].tolist() == as_read(
            [math.inf if value is None else value for value in distances]
        )
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "examples.npz") as archive:
        assert archive["l2_perturbed"].shape == (len(result.examples["l2"].index), 1, 8, 8)
    assert [panel.get_xlabel() for panel in result.plot().axes] == ["ε (l2)", "ε (linf)"]


def test_the_csv_of_a_regression_has_its_errors(tmp_path):
    import pandas as pd

    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    result = evaluate(nn.Linear(4, 2), (x, x[:, :2]), task="regression", epsilons=[0.5], **QUICK)
    result.save(tmp_path)
    samples = pd.read_csv(tmp_path / "samples.csv")
    assert {"label_0", "label_1", "prediction_0", "prediction_1", "error_l2_0", "error_l2_0.5"} <= set(samples)
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve["mean_absolute_error"].tolist() == [point.value for point in result.curves["l2"].points]
    assert [samples["error_l2_0"].mean(), samples["error_l2_0.5"].mean()] == pytest.approx(
        curve["mean_absolute_error"].tolist()
    )
    assert not (tmp_path / "classes.csv").exists()


def test_a_time_limit_leaves_a_partial_result_that_says_so(small_net, digits, tmp_path, monkeypatch):
    x, y = digits
    data = x[:20], y[:20]

    def end(stage, done, total):
        if "(l2)" in stage:
            monkeypatch.setattr(time, "monotonic", lambda: math.inf)

    options: dict[str, Any] = {"batch_size": 5, "folder": tmp_path, "epsilons": [0.5], "steps": 2, "restarts": 1}
    result = evaluate(small_net, data, **options, time_limit=100, progress=end)
    monkeypatch.undo()
    assert not result.complete
    assert result.curves["l2"].points[0].samples == 5
    assert {finding.verdict for finding in result.findings} == {"not run"}
    result.save(tmp_path)
    assert "partial" in (tmp_path / "report.html").read_text()
    assert Evaluation.load(tmp_path).to_dict() == result.to_dict()
    rest = evaluate(small_net, data, **options, resume=True)
    assert rest.complete
    assert figures(rest) == figures(evaluate(small_net, data, **{**options, "folder": None}))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_what_a_time_limit_leaves_nothing_of_is_not_in_the_result(blobs, tmp_path, monkeypatch, task):
    x, y = blobs
    model = nn.Linear(2, 1 if task == "regression" else 2)
    options = {**QUICK, "task": task, "norms": ["l2", "linf"], "batch_size": 10}
    with pytest.raises(EvaluationFailed, match="before the first batch was done"):
        evaluate(model, (x, y), **options, time_limit=1e-9)

    def end_before_linf(stage, done, total):
        if "(l2)" in stage:
            monkeypatch.setattr(time, "monotonic", lambda: math.inf)

    result = evaluate(model, (x, y), **options, time_limit=100, progress=end_before_linf)
    monkeypatch.undo()
    assert list(result.curves) == ["l2"]
    assert not result.complete
    result.save(tmp_path)
    assert Evaluation.load(tmp_path).to_dict() == result.to_dict()


def test_a_time_limit_ends_the_only_batch_between_two_runs_of_a_solver(small_net, digits, tmp_path, monkeypatch):
    x, y = digits
    options = {"folder": tmp_path, "epsilons": [0.5], "steps": 5, "restarts": 18}
    calls = 0

    class Counts(nn.Module):
        def forward(self, x):
            nonlocal calls
            calls += 1
            if calls == 8:
                monkeypatch.setattr(time, "monotonic", lambda: math.inf)
            return small_net(x)

    result = evaluate(Counts(), (x[:20], y[:20]), **options, time_limit=100)
    monkeypatch.undo()
    assert calls < 30
    assert not result.complete
    curve = result.curves["l2"]
    assert curve.points[0].samples == 20
    assert not curve.confirmed
    assert {finding.verdict for finding in result.findings} == {"not run"}
    assert result.unmade
    rest = evaluate(small_net, (x[:20], y[:20]), **options, resume=True, diagnostics=False, overwrite=True)
    assert rest.complete
    # Fewer runs find no nearer errors.
    assert (result.distance["l2"] >= rest.distance["l2"] * 0.99).all()


def test_progress_beats_inside_a_batch(small_net, digits):
    beats = []

    class Told:
        def __call__(self, stage, done, total):
            assert done

        def beat(self, stage, done, total):
            beats.append((stage, done, total))

    x, y = digits
    evaluate(small_net, (x[:4], y[:4]), epsilons=[0.5], steps=2, restarts=1, progress=Told(), diagnostics=False)
    assert any(stage == "Searching the nearest errors (l2)" and 0 <= done < 1 == total for stage, done, total in beats)


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(half_plane, blobs, tmp_path):
    options = {**QUICK, "folder": tmp_path, "epsilons": [0.5]}
    evaluate(half_plane, blobs, **options)
    with pytest.raises(InputError, match="resume=True"):
        evaluate(half_plane, blobs, **options)
    with pytest.raises(InputError, match="seed"):
        evaluate(half_plane, blobs, **options, resume=True, seed=1)
    with pytest.raises(InputError, match="had another model"):
        evaluate(nn.Linear(2, 2), blobs, **options, resume=True)
    with pytest.raises(InputError, match="had another model output"):
        evaluate(half_plane, blobs, **options, resume=True, preprocess=lambda x: x - 1)
    assert evaluate(half_plane, blobs, **options, overwrite=True, seed=1).complete


def test_a_function_that_answers_otherwise_does_not_go_on_with_anothers_run(blobs, tmp_path):
    options = {**QUICK, "folder": tmp_path, "epsilons": [0.5]}
    first = evaluate(lambda x: x, blobs, **options)
    with pytest.raises(InputError, match="had another model output"):
        evaluate(lambda x: -x, blobs, **options, resume=True)
    again = evaluate(lambda x: x * (1 + 1e-6), blobs, **options, resume=True)
    assert (again.distance["l2"] == first.distance["l2"]).all()
