"""Points of earlier evaluations: what was found once is not lost, and what cannot be used is refused in a sentence."""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.cli import main
from rai_toolbox.robustness import EvaluationFailed, InputError, Samples, evaluate
from rai_toolbox.robustness.attack._earlier import try_earlier
from rai_toolbox.robustness.attack._settings import Settings
from rai_toolbox.robustness.attack._subject import EarlierPoints
from rai_toolbox.robustness.data._rows import ArrayRows
from rai_toolbox.robustness.run._preparation import prepare

LONG: dict[str, Any] = {"steps": 15, "restarts": 2, "diagnostics": False, "average": 0}
SHORT: dict[str, Any] = {"steps": 1, "restarts": 1, "diagnostics": False, "average": 0}


class Reversed(torch.autograd.Function):
    """The identity with the gradient of its opposite: every search that follows it is led away."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


@pytest.fixture
def misleading(half_plane):
    return lambda x: half_plane(Reversed.apply(x))


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l0"])
def test_a_rerun_with_fewer_steps_is_nowhere_above_the_earlier_one(small_net, digits, tmp_path, norm):
    data = digits[0][:16], digits[1][:16]
    before = evaluate(small_net, data, norms=norm, keep_points=True, **LONG)
    before.save(tmp_path)
    alone = evaluate(small_net, data, norms=norm, **SHORT)
    after = evaluate(small_net, data, norms=norm, also_try=tmp_path, batch_size=5, **SHORT)
    assert (after.distance[norm] <= before.distance[norm]).all()
    assert (alone.distance[norm] > before.distance[norm]).any()
    for point in before.curves[norm].points:
        assert (after.distance[norm] > point.epsilon).mean() <= point.value
    helped = after.found_by[norm] == "also-try"
    assert helped.any()
    first = alone.found_by[norm] == "minimum_norm"  # in L0 the confirmation may find as near a one
    assert (after.distance[norm] <= alone.distance[norm])[helped].all()
    assert (after.distance[norm] < alone.distance[norm])[helped & first].all()
    for point in after.curves[norm].points:
        assert point.by_minimum_norm is not None
        broken = round((point.by_minimum_norm - point.value) * 16)
        assert broken == point.also_by_earlier_points + point.also_by_fixed_budget
    assert sum(point.also_by_earlier_points for point in after.curves[norm].points) > 0


def test_the_error_of_a_regression_is_nowhere_below_the_earlier_one(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    options = {"task": "regression", "epsilons": [0.2, 0.5, 1.0]}
    before = evaluate(net, (x, x[:, :2]), keep_points=True, **options, **LONG)
    assert len(before.examples["l2"].index) == 3 * 12
    before.save(tmp_path)
    alone = evaluate(net, (x, x[:, :2]), **options, **SHORT)
    after = evaluate(net, (x, x[:, :2]), also_try=str(tmp_path), **options, **SHORT)
    assert (after.error["l2"] >= before.error["l2"] * (1 - 1e-6)).all()
    assert (alone.error["l2"] < before.error["l2"] * 0.999).any()
    assert "also-try" in after.found_by["l2"]
    assert (after.found_by["l2"][0] == "").all()
    # The gallery shows a sample once, whatever is kept of it.
    assert (before.save(tmp_path) / "report.html").read_text().count("<small>sample 3,") == 1


def test_points_are_projected_into_the_ball_of_each_radius_and_into_the_box(half_plane, blobs):
    x, y = blobs
    # For every sample a point far beyond the boundary, outside of the box.
    far = x - np.where(y[:, None] > 0, 4.0, -4.0).astype(np.float32) * np.array([1, 0], np.float32)
    settings = Settings.checked(norms="l2", keep_points=True)
    subject, _ = prepare(half_plane, blobs, settings, (-1.5, 1.5), None, None, None, None, None, {})
    subject.earlier = {"l2": EarlierPoints(np.arange(40), far, np.full(40, 4.0))}
    margin = np.abs(x[:, 0])
    found = try_earlier(subject, "l2", 0, (0.3, 0.6), np.full(40, np.inf))
    assert found["distance"] == pytest.approx(np.where(margin < 0.3, 0.3, np.where(margin < 0.6, 0.6, 1.5 + margin)))
    assert set(found["by"]) == {"also-try"}
    assert np.abs(found["shown_input"]).max() == 1.5
    # What is known to be nearer stays, and is not marked.
    known = np.where(margin < 0.5, margin, np.inf)
    found = try_earlier(subject, "l2", 0, (0.3, 0.6), known)
    assert (found["distance"][margin < 0.5] == margin[margin < 0.5]).all()
    assert ((found["by"] == "") == (margin < 0.5)).all()
    # A distance that the file understates is not believed.
    subject.earlier = {"l2": EarlierPoints(np.arange(40), far, np.full(40, 0.1))}
    assert np.isinf(try_earlier(subject, "l2", 0, (0.3, 0.6), np.full(40, np.inf))["distance"]).all()


def test_samples_are_matched_by_number_and_by_id(misleading, half_plane, blobs):
    x, y = blobs
    some = evaluate(half_plane, (x[:30], y[:30]), epsilons=[0.5], keep_points=True, **LONG)
    more = evaluate(misleading, blobs, epsilons=[0.5], also_try=some, adaptive=False, **SHORT)
    assert (more.distance["l2"][:30] <= some.distance["l2"]).all()
    fewer = evaluate(misleading, (x[:9], y[:9]), epsilons=[0.5], also_try=[some, some], adaptive=False, **SHORT)
    assert (fewer.distance["l2"] <= some.distance["l2"][:9]).all()

    def called(order):
        return Samples(ArrayRows(x[order]), y[order], ids=tuple(f"s{number}" for number in order))

    order = np.arange(40)[::-1]
    before = evaluate(half_plane, called(np.arange(40)), epsilons=[0.5], keep_points=True, **LONG)
    after = evaluate(misleading, called(order), epsilons=[0.5], also_try=before, adaptive=False, **SHORT)
    assert (after.distance["l2"] <= before.distance["l2"][order]).all()
    with pytest.raises(InputError, match="is of other samples: its input of sample"):
        evaluate(misleading, (x[order], y[order]), epsilons=[0.5], also_try=before, **SHORT)


@pytest.fixture
def earlier(half_plane, blobs, tmp_path):
    return evaluate(half_plane, blobs, epsilons=[0.5], keep_points=True, **SHORT).save(tmp_path / "earlier")


def test_what_cannot_be_tried_is_told_in_a_sentence(half_plane, blobs, earlier, tmp_path):
    x, y = blobs

    def refused(data=blobs, model=half_plane, also_try=earlier, **options):
        with pytest.raises(InputError) as caught:
            evaluate(model, data, also_try=also_try, **SHORT, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot read" in refused(also_try=tmp_path / "nothing")
    assert "of samples of shape (2,), the data have (3,)" in refused(
        (np.zeros((40, 3), np.float32), y), nn.Linear(3, 2)
    )
    assert "is of other samples" in refused((x + np.float32(0.01), y))
    assert "has no points in linf: it was evaluated in l2" in refused(norms="linf")
    assert "is a classification, this is a regression" in refused((x, x), task="regression")
    few = evaluate(half_plane, (np.tile(x, (2, 1)), np.tile(y, 2)), epsilons=[0.5], **SHORT)
    assert "has not kept the points of 32 of its 80 samples in l2: evaluate it with keep_points=True" in refused(
        (np.tile(x, (2, 1)), np.tile(y, 2)), also_try=few
    )
    for name, damage in DAMAGES.items():
        broken = shutil.copytree(earlier, tmp_path / name)
        damage(broken / "examples.npz")
        assert "examples.npz" in refused(also_try=broken)


def resaved(file, **changes):
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez(file, **{name: values for name, values in (arrays | changes).items() if values is not None})


DAMAGES = {
    "absent": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "without an array": lambda file: resaved(file, l2_perturbed=None),
    "other shape": lambda file: resaved(file, l2_perturbed=np.zeros((3, 2), np.float32)),
    "words": lambda file: resaved(file, l2_distance=np.array(["a"] * 40)),
    "nan": lambda file: resaved(file, l2_perturbed=np.full((40, 2), np.nan, np.float32)),
    "another evaluation": lambda file: resaved(file, l2_index=np.arange(40) + 7),
}


def test_a_run_goes_on_with_the_points_that_it_began_with(half_plane, blobs, earlier, tmp_path, monkeypatch):
    def end(stage, done, total):
        if "earlier" in stage:
            monkeypatch.setattr(time, "monotonic", lambda: math.inf)

    options: dict[str, Any] = {**SHORT, "epsilons": [0.2], "batch_size": 10, "also_try": earlier}
    folder = tmp_path / "run"
    part = evaluate(half_plane, blobs, **options, folder=folder, time_limit=1000, progress=end)
    monkeypatch.undo()
    assert not part.complete
    assert part.save(tmp_path / "part")
    others = evaluate(half_plane, blobs, epsilons=[0.5], keep_points=True, **LONG)
    with pytest.raises(InputError, match="had another also try"):
        evaluate(half_plane, blobs, **{**options, "also_try": others}, folder=folder, resume=True)
    rest = evaluate(half_plane, blobs, **options, folder=folder, resume=True)
    whole = evaluate(half_plane, blobs, **options)
    assert rest.complete
    assert (rest.distance["l2"] == whole.distance["l2"]).all()
    assert (rest.found_by["l2"] == whole.found_by["l2"]).all()


def test_the_command_keeps_points_and_tries_several_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = np.linspace(-1, 1, 60, dtype=np.float32)[:, None]
    np.savez("data.npz", x=x, y=(x[:, 0] > 0).astype(int))
    (tmp_path / "net.py").write_text("def make():\n    return lambda x: 3 * x\n")
    words = ["evaluate", "--model", "net.py:make", "--data", "data.npz", "--no-diagnostics", "--quiet", "--steps", "2"]
    assert main([*words, "--out", "plain"]) == 0
    assert main([*words, "--out", "second", "--also-try", "plain"]) == 2
    assert "evaluate it with --keep-points, which keeps" in capsys.readouterr().err
    assert main([*words, "--out", "first", "--keep-points"]) == 0
    assert main([*words, "--out", "second", "--keep-points", "--also-try", "first", "--also-try", "first"]) == 0
    assert main([*words, "--out", "first", "--also-try", "first", "--also-try", "second"]) == 0
    assert 'also-try = ["first", "second"]' in (tmp_path / "first" / "config.toml").read_text()


def test_the_attack_that_found_each_error_is_told(misleading, half_plane, blobs, tmp_path):
    result = evaluate(half_plane, blobs, epsilons=[0.5], **{**LONG, "average": 3})
    found = result.found_by["l2"]
    assert ((found == "") == ~(np.isfinite(result.distance["l2"]) & (result.distance["l2"] > 0))).all()
    assert set(found) <= {"", "minimum_norm", "worst_case", "random point"}
    led_away = evaluate(misleading, blobs, epsilons=[0.5], steps=3, restarts=1, average=0)
    assert led_away.distance["l2"].max() < 2
    assert set(led_away.found_by["l2"]) & {"differences", "transfer", "decisions", "random search"}
    assert "stronger_l2" in led_away.timings
    queried = evaluate(in_numpy, blobs, epsilons=[0.5], queries=300, **SHORT)
    assert set(queried.found_by["l2"]) - {""} <= {"decisions", "differences", "random search"}
    random = evaluate(
        lambda x: Reversed.apply(x) @ torch.tensor([1.0, 0.0]),
        blobs,
        epsilons=[0.5],
        **{**SHORT, "average": 9},
        adaptive=False,
    )
    assert "random point" in random.found_by["l2"]
    page = (random.save(tmp_path) / "report.html").read_text()
    count = int((random.found_by["l2"] == "random point").sum())
    assert f"{count} by random point" in page
    assert "found_by_l2" in (tmp_path / "samples.csv").read_text().splitlines()[0]


def in_numpy(x):
    return torch.from_numpy(x.numpy() @ np.array([[-1, 1], [0, 0]], np.float32))


def test_more_than_one_folder_cannot_be_lost_to_a_limit_that_comes_at_once(half_plane, blobs, earlier):
    with pytest.raises(EvaluationFailed, match="before the first batch"):
        evaluate(half_plane, blobs, also_try=[earlier, earlier], time_limit=1e-9, **SHORT)
