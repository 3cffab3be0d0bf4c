"""The figures: right where they are known, and the same however they were come by."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.perturbations import Solution
from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness.attack import _solver
from rai_toolbox.robustness.attack._grid import grid_for_distances

QUICK = {"steps": 10, "restarts": 1, "diagnostics": False}


def figures(evaluation):
    """Everything in results.json but what may differ from run to run."""
    content = evaluation.to_dict()
    return {key: value for key, value in content.items() if key not in ("timings", "environment")}


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_curve_of_a_half_plane_is_known(half_plane, blobs, norm):
    x, _ = blobs
    result = evaluate(half_plane, blobs, norms=norm, epsilons=[0.3, 0.7, 1.5], **QUICK)
    for point in result.curves[norm].points:
        # Every norm's nearest error lies straight across x0 = 0.
        assert point.value == pytest.approx(np.mean(np.abs(x[:, 0]) > point.epsilon), abs=1 / 40)
    assert result.distance[norm] == pytest.approx(np.abs(x[:, 0]), abs=2e-2)


def test_what_is_wrong_from_the_start_counts_at_epsilon_zero(half_plane, blobs):
    x, y = blobs
    y = y.copy()
    y[:10] = 1 - y[:10]
    result = evaluate(half_plane, (x, y), epsilons=[0.1], **QUICK)
    assert result.curves["l2"].points[0].value == 0.75
    assert (result.distance["l2"][:10] == 0).all()


def test_the_default_grid_reaches_to_where_nothing_stands(small_net, digits):
    x, y = digits
    for norm in ("l2", "linf"):
        curve = evaluate(small_net, (x[:48], y[:48]), norms=norm, **QUICK).curves[norm]
        assert 4 <= len(curve.points) - 1 <= 8
        assert curve.points[-1].value <= 0.05
        assert curve.points[-3].by_minimum_norm > 0  # the grid comes from these distances; a fixed budget may find more


def test_a_nan_among_the_logits_is_no_right_answer(half_plane, blobs):
    def sometimes_nan(x):
        # Of the class that is right there: argmax takes a NaN for the largest.
        far = torch.stack([x[:, 0] < -0.8, x[:, 0] > 0.8], dim=1)
        return torch.where(far, torch.nan, half_plane(x))

    x, _ = blobs
    result = evaluate(sometimes_nan, blobs, epsilons=[0.01], **QUICK)
    assert result.curves["l2"].points[0].value == np.mean(np.abs(x[:, 0]) <= 0.8)
    assert (result.distance["l2"][np.abs(x[:, 0]) > 0.8] == 0).all()


@pytest.mark.parametrize("lazy", ["minimum_norm", "worst_case"])
def test_at_each_epsilon_the_lower_of_what_the_two_solvers_leave_is_reported(half_plane, blobs, monkeypatch, lazy):
    def finds_nothing(model, x, target, **options):
        zeros = torch.zeros(len(x))
        return Solution(x.clone(), zeros, zeros.bool(), zeros + math.inf)

    x, _ = blobs
    monkeypatch.setattr(_solver, lazy, finds_nothing)
    curve = evaluate(half_plane, blobs, epsilons=[0.3, 0.7], **QUICK).curves["l2"]
    for point in curve.points[1:]:
        assert point.value == pytest.approx(np.mean(np.abs(x[:, 0]) > point.epsilon), abs=1 / 40)
        if lazy == "minimum_norm":
            assert point.by_minimum_norm == 1.0
            assert point.also_by_fixed_budget == round(40 * (1 - point.value))
        else:
            assert point.by_minimum_norm == point.value
            assert point.also_by_fixed_budget == 0
    assert curve.confirmed


def test_radii_of_l0_are_whole_numbers(half_plane, blobs):
    curve = evaluate(half_plane, blobs, norms="l0", steps=5, restarts=1).curves["l0"]
    assert [(point.epsilon, point.value) for point in curve.points] == [(0.0, 1.0), (1.0, 0.0)]
    for reach in (1, 3, 8, 9, 20, 21, 500, 3072):
        grid = grid_for_distances("l0", np.arange(1.0, reach + 1), np.inf)
        assert all(epsilon == int(epsilon) for epsilon in grid)
        assert len(grid) <= 8
        assert grid[-1] >= 0.99 * reach - 1
        assert grid[-1] < reach + grid[0]
    with pytest.raises(InputError, match=r"whole number \(how many features may change\), got 1\.5"):
        evaluate(half_plane, blobs, norms=["l2", "l0"], epsilons={"l2": [1.5], "l0": [1.5]})


def test_reported_inputs_are_within_epsilon_and_bounds(small_net, digits):
    x, y = digits
    result = evaluate(small_net, (x[:24], y[:24]), norms=["l2", "linf"], bounds=(0, 1), **QUICK)
    for norm, order in (("l2", 2), ("linf", np.inf)):
        shown = result.examples[norm]
        assert shown.perturbed.min() >= 0
        assert shown.perturbed.max() <= 1
        delta = (shown.perturbed.astype(float) - shown.original).reshape(len(shown.index), -1)
        assert np.linalg.norm(delta, order, axis=1) == pytest.approx(shown.distance, rel=1e-5)
        assert (np.diff(shown.distance) >= 0).all()
        with torch.no_grad():
            again = small_net(torch.from_numpy(shown.perturbed)).argmax(dim=1).numpy()
        assert (again == shown.prediction).all()
        assert (again != y[shown.index]).all()


def test_frozen_features_do_not_move(small_net, digits):
    x, y = digits
    mask = np.zeros((1, 8, 8), dtype=bool)
    mask[:, 2:6] = True
    shown = evaluate(small_net, (x[:24], y[:24]), mask=mask, **QUICK).examples["l2"]
    assert (shown.perturbed[:, ~mask] == shown.original[:, ~mask]).all()
    assert (shown.perturbed[:, mask] != shown.original[:, mask]).any()


def test_the_same_seed_gives_the_same_numbers_and_another_batch_size_the_same_figures(small_net, digits):
    x, y = digits
    data = x[:30], y[:30]
    options = {**QUICK, "epsilons": [0.3, 0.6], "diagnostics": True}
    first = evaluate(small_net, data, **options)
    again = evaluate(small_net, data, **options)
    assert figures(first) == figures(again)
    smaller = evaluate(small_net, data, **options, batch_size=7)
    assert smaller.distance["l2"] == pytest.approx(first.distance["l2"], rel=1e-3)


def test_the_users_model_and_random_state_are_as_they_were(digits):
    x, y = digits
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10), nn.BatchNorm1d(10))
    net.train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(net, (x[:12], y[:12]), epsilons=[0.3], steps=3, restarts=1)
    assert [module.training for module in net.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_form_of_data_gives_the_same_result(half_plane, blobs):
    x, y = blobs
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    dataset = TensorDataset(*tensors)
    forms = [
        (x, y),
        {"x": x, "y": y},
        tensors,
        dataset,
        DataLoader(dataset, batch_size=7),
        list(zip(x, y, strict=True)),
    ]
    results = [figures(evaluate(half_plane, form, epsilons=[0.5], **QUICK)) for form in forms]
    assert all(result == results[0] for result in results[1:])


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_any_number_of_logits_works(classes):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, classes, generator=torch.Generator().manual_seed(1))

    def model(x):
        return x @ weight

    logits = model(x)
    y = (logits[:, 0] > 0).long() if classes == 1 else logits.argmax(dim=1)
    result = evaluate(model, (x, y), norms=["l2", "linf"], **QUICK)
    for curve in result.curves.values():
        assert curve.points[0].value == 1.0
        assert curve.points[-1].value <= 0.05


def test_a_model_of_half_precision_or_double_is_asked_in_its_dtype(half_plane, blobs):
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Linear(2, 2, bias=False).to(dtype)
        model.load_state_dict({"weight": half_plane.weight.to(dtype)})
        result = evaluate(model, blobs, epsilons=[0.5], **QUICK)
        assert result.curves["l2"].points[1].value == pytest.approx(0.5, abs=0.05)


def test_preprocessing_keeps_epsilon_in_the_datas_units(half_plane, blobs):
    x, y = blobs
    plain = evaluate(half_plane, blobs, epsilons=[0.5], **QUICK)
    shifted = evaluate(half_plane, (100 * x + 7, y), epsilons=[50.0], preprocess=lambda x: (x - 7) / 100, **QUICK)
    assert shifted.curves["l2"].points[1].value == plain.curves["l2"].points[1].value


def test_regression_reports_the_error_that_is_known():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    weight = np.array([1.0, -2.0, 2.0], dtype=np.float32)
    y = x @ weight + 0.5
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight)[None])
    result = evaluate(model, (x, y), task="regression", norms=["l2", "linf"], epsilons=[0.1, 1.0], **QUICK)
    for norm, dual in (("l2", 3.0), ("linf", 5.0)):
        values = [point.value for point in result.curves[norm].points]
        assert values == pytest.approx([0.5, 0.5 + 0.1 * dual, 0.5 + dual], rel=1e-3)
    assert result.measure == "mean absolute error"
    for norm, shown in result.examples.items():
        with torch.no_grad():
            assert shown.prediction == pytest.approx(model(torch.from_numpy(shown.perturbed)).numpy(), rel=1e-5)
        assert (shown.distance <= result.curves[norm].points[2].epsilon * (1 + 1e-6)).all()


def test_regression_finds_a_grid_for_the_data():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32) * 50
    result = evaluate(nn.Linear(4, 2), (x, np.zeros((30, 2))), task="regression", **QUICK)
    assert 4 <= len(result.curves["l2"].points) - 1 <= 8
    assert 5 < result.curves["l2"].points[-1].epsilon < 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norms": "l3"}, "norms must be one of l1, l2, linf, l0, got 'l3'"),
        ({"epsilons": [-1]}, "not negative, got -1"),
        ({"epsilons": [float("nan")]}, "finite"),
        ({"epsilons": [0]}, "above 0"),
        ({"epsilons": {"linf": [1]}}, "the norms are l2"),
        ({"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"task": "ranking"}, "task"),
        ({"bounds": (1, 0)}, "lower bound must be less"),
        ({"bounds": (0, 0.5)}, "outside the bounds"),
        ({"bounds": (0, np.ones(3))}, "expected that of one sample"),
        ({"bounds": "all"}, "bounds"),
        ({"mask": np.zeros(2)}, "nothing may change"),
        ({"mask": np.ones(5)}, "expected that of one sample"),
        ({"time_limit": 0}, "time_limit"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_settings_are_one_clear_line(half_plane, blobs, change, words):
    with pytest.raises(InputError) as caught:
        evaluate(half_plane, blobs, **{"epsilons": [0.5], **QUICK, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x, y: (x[:-1], y), "differ in length"),
        (lambda x, y: (x, y + 1), "the label of sample"),
        (lambda x, y: (x, y - 1), "the label of sample 0 is -1"),
        (lambda x, y: (x, y + 0.5), "expected a class number"),
        (lambda x, y: (np.where(x > 0.9, np.nan, x), y), "NaN"),
        (lambda x, y: (np.where(x > 0.9, np.inf, x), y), "infinite"),
        (lambda x, y: (x[:0], y[:0]), "at least one sample"),
        (lambda x, y: (x[:, 0], y), "(samples, ...)"),
        (lambda x, y: (x.astype(complex), y), "real numbers"),
        (lambda x, y: (x, np.stack([y, y], axis=1)), "one label per sample"),
        (lambda x, y: x, "expected (input, target) pairs"),
        (lambda x, y: 7, "expected a pair"),
        (lambda x, y: ([[1.0], [1.0, 2.0]], y), "inhomogeneous"),
        (lambda x, y: [(x[0], 0), (x[1], 0), (x[0, :1], 1)], "samples differ in shape"),
        (lambda x, y: {"inputs": x}, "'x' and 'y'"),
    ],
)
def test_bad_data_are_one_clear_line(half_plane, blobs, spoil, words):
    with pytest.raises(InputError) as caught:
        evaluate(half_plane, spoil(*blobs), epsilons=[0.5], **QUICK)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda x: x[0], "the model's output has shape"),
        (lambda x: (x, x), "returned tuple"),
        (lambda x: x.long(), "dtype"),
        (lambda x: x @ torch.ones(5, 2), "cannot take a batch"),
        (lambda x: x * float("nan"), "NaN or infinite for every sample"),
        (3, "must be an nn.Module"),
    ],
)
def test_a_model_that_cannot_be_used_is_one_clear_line(blobs, model, words):
    with pytest.raises(InputError) as caught:
        evaluate(model, blobs, epsilons=[0.5], **QUICK)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
