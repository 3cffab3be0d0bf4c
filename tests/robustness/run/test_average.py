"""The average beside the worst case, and corruptions: against closed forms, and the coverage of the intervals."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from rai_toolbox.robustness import InputError, evaluate
from rai_toolbox.robustness._statistics import clopper_pearson_interval

QUICK = {"steps": 2, "restarts": 1, "diagnostics": False, "batch_size": 4000}
PHI = stats.norm.cdf


def half_space(*weights, offset=0.0):
    """The classifier that says 1 where ⟨w, x⟩ > offset, and calls of it that are cheap."""
    w = torch.tensor(weights)
    return lambda x: x.flatten(1) @ w - offset


def rate(points, epsilon):
    """The entry of an average at a radius."""
    return next(point for point in points if math.isclose(point.epsilon, epsilon))


def test_the_interval_is_that_of_scipy():
    for trials in (1, 2, 7, 100, 12_345, 1_000_000):
        for successes in sorted({0, 1, trials // 3, trials // 2, trials - 1, trials}):
            low, high = clopper_pearson_interval(successes, trials)
            k, n = successes, trials
            assert low == pytest.approx(stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0, rel=1e-9)
            assert high == pytest.approx(stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0, rel=1e-9)
    assert clopper_pearson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        clopper_pearson_interval(3, 2)


@pytest.mark.parametrize("chances", ["equal", "different"])
def test_the_interval_covers_at_least_as_often_as_it_says(chances):
    rng = np.random.default_rng(0)
    for trials in (10, 60):
        for mean in (0.02, 0.3, 0.5, 0.9):
            p = np.full(trials, mean)
            if chances == "different":  # as samples differ; the interval is of their mean
                p = np.clip(p + rng.uniform(-0.3, 0.3, trials), 0, 1)
            counts = (rng.random((4000, trials)) < p).sum(axis=1)
            ends = np.array([clopper_pearson_interval(k, trials) for k in range(trials + 1)])[counts]
            covered = (ends[:, 0] <= p.mean()) & (p.mean() <= ends[:, 1])
            assert covered.mean() >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize(
    ("norm", "share"),
    [
        # Of a point that is uniform in the ball of radius 1, how often its first coordinate is above 0.4.
        ("linf", 0.3),
        ("l2", 0.5 * stats.beta.cdf(1 - 0.4**2, 2.0, 0.5)),  # of three entries: a cap
        ("l1", 0.5 * 0.6**3),
    ],
)
def test_the_error_at_random_points_of_a_linear_model_is_the_closed_form(norm, share):
    x = np.zeros((4000, 3), dtype=np.float32)
    result = evaluate(
        half_space(1.0, 0.0, 0.0, offset=0.4), (x, np.zeros(4000)), norms=norm, epsilons=[0.4, 1], **QUICK
    )
    average = result.curves[norm].average
    assert [point.epsilon for point in average] == [0, 0.4, 1]
    assert [point.error for point in average[:2]] == [0, 0]
    point = rate(average, 1)
    assert point.points == 4000
    assert point.low <= share <= point.high
    assert (point.low, point.high) == clopper_pearson_interval(round(point.error * 4000), 4000)
    assert point.clamped == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_points_are_uniform_on_ball_and_bounds(norm):
    # A quarter of the plane: two entries, both at their lower bound.
    x = np.zeros((4000, 2), dtype=np.float32)
    options = QUICK | {"epsilons": [1.0], "bounds": (0.0, 5.0)}
    result = evaluate(half_space(1.0, 0.0, offset=0.5), (x, np.zeros(4000)), norms=norm, **options)
    point = rate(result.curves[norm].average, 1)
    above = {
        "linf": 0.5,
        "l2": (math.acos(0.5) - 0.5 * math.sqrt(0.75)) / (math.pi / 2),  # a circular segment
        "l1": 0.25,
    }[norm]
    assert point.low <= above <= point.high
    assert point.clamped <= 4


def test_entries_that_may_not_change_are_no_part_of_the_ball():
    x = np.zeros((4000, 3), dtype=np.float32)
    model = half_space(1.0, 9.0, 9.0, offset=0.5)
    for norm, above in (("l2", 0.25), ("linf", 0.25), ("l1", 0.25)):
        result = evaluate(model, (x, np.zeros(4000)), norms=norm, epsilons=[1], mask=[True, False, False], **QUICK)
        point = rate(result.curves[norm].average, 1)
        assert point.low <= above <= point.high


def test_in_l0_as_many_features_change_as_epsilon_says_and_none_without_bounds():
    x = np.full((4000, 4), 0.5, dtype=np.float32)
    model = half_space(1.0, 0.0, 0.0, 0.0, offset=0.75)
    result = evaluate(model, (x, np.zeros(4000)), norms="l0", epsilons=[1, 2, 4], bounds=(0, 1), **QUICK)
    for epsilon in (1, 2, 4):
        point = rate(result.curves["l0"].average, epsilon)
        assert point.low <= 0.25 * epsilon / 4 <= point.high
    unbounded = evaluate(model, (x, np.zeros(4000)), norms="l0", epsilons=[1], **QUICK)
    assert unbounded.curves["l0"].average == ()


def test_points_of_a_sample_depend_on_neither_its_batch_nor_the_content_of_others():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    x[25:] = x[:25]  # equal samples get points of their own
    model, data = half_space(1.0, 0.5, 0.2), (x, np.zeros(50))
    options = QUICK | {"epsilons": [0.3, 1.0], "average": 3, "norms": ["l2", "linf", "l1"]}
    first = evaluate(model, data, **options)
    second = evaluate(model, data, **options | {"batch_size": 7})
    assert {n: c.average for n, c in first.curves.items()} == {n: c.average for n, c in second.curves.items()}
    assert first.curves["l2"].average[1].points == 150
    other = evaluate(model, data, seed=1, **options)
    assert other.curves["l2"].average != first.curves["l2"].average


def test_the_average_costs_as_many_forward_passes_as_it_says():
    x = np.zeros((30, 2), dtype=np.float32)
    options = QUICK | {"epsilons": [0.1, 0.2, 0.3]}
    costs = [
        evaluate(half_space(1.0, 1.0, offset=9.0), (x, np.zeros(30)), average=count, **options)
        .curves["l2"]
        .forwards_per_sample
        for count in (0, 1, 5)
    ]
    assert np.diff(costs).tolist() == pytest.approx([3, 12])


def test_a_random_point_that_is_misclassified_lowers_the_curve_that_no_attack_lowers():
    class Steps(nn.Module):
        """No gradient: it is zero wherever it exists."""

        def forward(self, x):
            stepped = x + (torch.round(x * 20) / 20 - x).detach() * 1.0
            return (stepped - stepped.detach() + (x.detach().abs() > 0.3).float() - 0.5).sum(dim=1, keepdim=True) * 1.0

    x = np.zeros((200, 1), dtype=np.float32)
    options = QUICK | {"norms": "linf", "epsilons": [0.1, 1.0]}
    for count in (0, 1):
        result = evaluate(Steps(), (x, np.zeros(200)), average=count, **options)
        curve = result.curves["linf"]
        point = curve.at(1.0)
        assert point.by_minimum_norm >= point.value
        if count:
            assert rate(curve.average, 1.0).error <= 1 - point.value
            assert rate(curve.average, 1.0).error == pytest.approx(0.7, abs=0.15)
            assert (result.distance["linf"] > 0.3 - 1e-6).all()
            standing = round(200 * point.by_minimum_norm) - point.also_by_fixed_budget - point.also_by_stronger_attacks
            assert standing == round(200 * point.value)


def test_only_a_random_point_that_is_nearer_than_the_known_error_is_kept():
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    model, data = half_space(1.0, 0.5, 0.2), (x, np.zeros(60))
    result = evaluate(
        model, data, **QUICK | {"norms": "l2", "epsilons": [0.3, 1.0, 3.0], "average": 3}, keep_points=True
    )
    wrong = result.distance["l2"] == 0
    shown = result.examples["l2"]
    assert 10 < wrong.sum() < 50
    assert result.curves["l2"].average[0].error > 0
    assert not wrong[shown.index].any()
    assert np.array_equal(shown.distance, result.distance["l2"][shown.index])


def test_a_time_limit_within_the_average_leaves_what_was_drawn_and_a_later_run_goes_on(tmp_path, monkeypatch):
    def end(stage, done, total):
        if "random points" in stage and done == 1:
            monkeypatch.setattr(time, "monotonic", lambda: math.inf)

    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    given = half_space(1.0, 0.5), (x, x[:, 0] > 0)
    options = QUICK | {"epsilons": [0.3], "corruptions": [shifted], "severities": [1], "batch_size": 10}
    part = evaluate(*given, folder=tmp_path, time_limit=100, progress=end, **options)
    monkeypatch.undo()
    assert not part.complete
    assert [point.points for point in part.curves["l2"].average] == [10, 10]
    assert part.curves["l2"].points[0].samples == 40
    assert part.corruptions == {}
    part.save(tmp_path / "report")  # all files can be made of it
    rest, whole = evaluate(*given, folder=tmp_path, resume=True, **options), evaluate(*given, **options)
    assert rest.complete
    assert rest.curves["l2"].average == whole.curves["l2"].average
    assert rest.curves["l2"].points == whole.curves["l2"].points
    assert rest.corruptions == whole.corruptions


def test_a_regression_has_its_mean_error_at_random_points():
    x = np.linspace(-1, 1, 3000, dtype=np.float32)[:, None]
    result = evaluate(lambda v: 3 * v, (x, 3 * x), task="regression", norms="linf", epsilons=[0.5], **QUICK)
    point = result.curves["linf"].average[1]
    assert point.low <= 0.75 <= point.high  # 3 * E|u|, u uniform in [-0.5, 0.5]
    assert point.error < result.curves["linf"].at(0.5).value


def shifted(x, severity):
    """Add normal noise of that deviation."""
    return x + severity * torch.randn_like(x)


def uniform(x, severity):
    """Add noise that numpy draws."""
    return x + torch.from_numpy(np.random.uniform(-severity, severity, x.shape).astype(np.float32))  # noqa: NPY002


def test_corruptions_of_a_linear_model_are_the_closed_form():
    x = np.full((4000, 2), -1.0, dtype=np.float32)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    result = evaluate(
        half_space(1.0, 0.0), (x, np.zeros(4000)), epsilons=[0.5], corruptions=[shifted, uniform],
        severities=[4, 0.5, 2], average=0, **QUICK,
    )  # fmt: skip
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert list(result.corruptions) == ["shifted", "uniform"]
    for name, right in (
        ("shifted", lambda s: PHI(1 / s)),
        ("uniform", lambda s: 1.0 if s <= 1 else (1 + 1 / s) / 2),
    ):
        points = result.corruptions[name].points
        assert [point.severity for point in points] == [0, 0.5, 2, 4]
        assert points[0].value == 1
        for point in points[1:]:
            assert point.low <= right(point.severity) <= point.high
            assert point.samples == 4000
    again = evaluate(
        half_space(1.0, 0.0), (x, np.zeros(4000)), epsilons=[0.5], corruptions={"shifted": shifted, "uniform": uniform},
        severities=[0.5, 2, 4], average=0, **QUICK,
    )  # fmt: skip
    assert again.corruptions == result.corruptions


@pytest.mark.parametrize(
    ("corruption", "said"),
    [
        (lambda x, severity: x[:, :1], r"returned shape \(3, 1\), expected that of the batch it was given, \(3, 2\)"),
        (lambda x, severity: x / 0, "returned a NaN or an infinite value"),
        (lambda x, severity: [1, 2, 3][int(severity)] + None, "raised TypeError"),
        (lambda x: x, "raised TypeError"),
    ],
)
def test_a_corruption_that_returns_no_inputs_is_told_in_one_line(corruption, said):
    x = np.ones((3, 2), dtype=np.float32)
    with pytest.raises(InputError, match=f"corruptions: broken at severity 1 {said}"):
        evaluate(half_space(1.0, 1.0), (x, [1, 1, 1]), corruptions={"broken": corruption}, epsilons=[0.5], **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"average": -1}, "average must be a whole number, at least 0"),
        ({"severities": []}, "severities must be finite numbers above 0"),
        ({"severities": [0, 1]}, "severities must be finite numbers above 0"),
        ({"corruptions": [shifted, shifted]}, "two have the name 'shifted'"),
        ({"corruptions": ["fog"]}, "expected a function"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        evaluate(half_space(1.0), ([[1.0]], [1]), **{"corruptions": [shifted], **QUICK, **options})
