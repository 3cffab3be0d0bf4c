"""Each check on models made to have its fault, and on sound ones for false alarms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from zoo import moat

from rai_toolbox.perturbations import Solution, minimum_norm, worst_case
from rai_toolbox.robustness import evaluate, load_preprocess
from rai_toolbox.robustness.attack import _solver
from rai_toolbox.robustness.checks import _search_checks
from rai_toolbox.robustness.run import _run


class Wrapped(nn.Module):
    """A model with something done to its input or output."""

    def __init__(self, net, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class LyingGradient(torch.autograd.Function):
    """The identity, with a backward pass that points downhill."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return torch.full_like(grads[0], torch.nan)


class BatchStatistics(nn.Module):
    """Batch normalization that stays in training mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(nn.functional.batch_norm(x, None, None, training=True) * 0.3 + 0.3)


def verdicts(model, digits, **options):
    x, y = digits
    options = {"norms": "l2", "epsilons": [0.3, 0.6, 1.2], "steps": 20, "restarts": 1} | options
    result = evaluate(model, (x[:24], y[:24]), **options)
    return {finding.check: finding for finding in result.findings}


@pytest.mark.slow
def test_the_built_in_model_raises_no_alarm(digits_net, digits):
    grids = {"l2": [0.3, 0.6, 1.2], "linf": [0.05, 0.1, 0.2]}
    found = verdicts(digits_net, digits, norms=list(grids), epsilons=grids, steps=50, restarts=3)
    assert_no_alarm(found)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l0"])
def test_a_sound_model_raises_no_alarm(small_net, digits, norm):
    grid = {"l2": [0.3, 0.6, 1.2], "linf": [0.05, 0.1, 0.2], "l1": [1.0, 2.0, 4.0], "l0": [1, 2, 4]}[norm]
    assert_no_alarm(verdicts(small_net, digits, norms=norm, epsilons=grid, steps=40, restarts=3))


def assert_no_alarm(found):
    seen = {check: finding.verdict for check, finding in found.items()}
    # In an evaluation this small some are left out where no probe leaves a doubt.
    for rival in ("gradient-masking", "finite-differences", "transfer"):
        assert seen.pop(rival) in ("ok", "not run")
    assert seen == dict.fromkeys(seen, "ok")


def test_a_sound_model_of_a_table_without_bounds_raises_no_alarm():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6)).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
    y = model(torch.from_numpy(x)).argmax(dim=1).numpy()
    result = evaluate(model, (x, y), norms=["l0", "l1", "linf"], steps=20, restarts=2)
    assert {finding.verdict for finding in result.findings} <= {"ok", "not run"}


def test_a_random_model_is_noticed(small_net, digits):
    noisy = Wrapped(small_net, before=lambda x: x + 0.2 * torch.randn_like(x))
    assert verdicts(noisy, digits)["random-model"].verdict == "distrust"


def test_a_model_that_mixes_its_batch_is_noticed(small_net, digits):
    found = verdicts(BatchStatistics(small_net), digits)
    assert found["batch-dependence"].verdict == "distrust"
    assert found["random-model"].verdict == "ok"


def test_an_input_that_is_rounded_has_zero_gradients(small_net, digits):
    found = verdicts(Wrapped(small_net, before=lambda x: (x * 4).round() / 4), digits)
    assert found["zero-gradients"].verdict == "distrust"
    assert found["zero-gradients"].evidence["share_zero"] == 1.0


def test_gradients_that_are_nan_are_noticed(small_net, digits):
    found = verdicts(Wrapped(small_net, before=NanGradient.apply), digits)
    assert found["zero-gradients"].evidence["share_not_finite"] == 1.0
    assert found["zero-gradients"].verdict == "distrust"


def test_gradients_that_vanish_are_noticed(small_net, digits):
    def flat_steps(x):
        # A staircase whose treads rise by next to nothing.
        return (x * 4).round() / 4 + 1e-7 * x

    found = verdicts(Wrapped(small_net, before=flat_steps), digits, adaptive=False)
    assert found["zero-gradients"].evidence["share_vanishing"] > 0.9
    assert found["zero-gradients"].verdict == "warning"
    assert found["gradient-agreement"].verdict == "distrust"


def test_probabilities_of_a_confident_network_are_no_reason_to_distrust(small_net, digits):
    def confident(logits):
        return (2 * logits).softmax(dim=1)

    options = {"epsilons": [0.3], "steps": 5, "restarts": 1, "adaptive": False}
    found = verdicts(Wrapped(small_net, after=confident), digits, **options)
    assert found["zero-gradients"].evidence["share_vanishing"] > 0.1
    assert found["zero-gradients"].verdict == "warning"
    assert found["gradient-agreement"].verdict == "ok"


def test_a_gradient_that_is_honest_at_the_samples_alone_is_noticed(small_net, digits):
    images = torch.from_numpy(digits[0]).flatten(1)

    def hidden(x):
        near = (torch.cdist(x.detach().flatten(1), images).amin(dim=1) < 0.65).reshape(-1, 1, 1, 1)
        return torch.where(near, x, x.detach() + 0.1 * (x - x.detach()).flip(-2))

    found = verdicts(Wrapped(small_net, before=hidden), digits, epsilons=[1.0, 2.0], steps=5, adaptive=False)
    found = found["gradient-agreement"]
    assert found.evidence["correlation_within_0.3_epsilon"] > 0.97
    assert found.verdict == "distrust"
    assert found.evidence["correlation_within_0.3_epsilon_after_a_step"] < 0.8


def test_a_kink_that_a_whole_step_reaches_in_all_entries_at_once_is_no_lie():
    # As in networks trained on attacks: background pixels are 0, and below a threshold they count for less.
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.choice([-1.0, 1.0], 400).astype(np.float32))
    more = weight * torch.from_numpy(rng.uniform(0, 4, 400).astype(np.float32))

    def model(x):
        score = x @ weight + (x - 0.2).relu() @ more - 30
        return torch.stack([-score, score], dim=1)

    x, y = np.zeros((24, 400), np.float32), np.zeros(24, np.int64)
    options = {"norms": "linf", "epsilons": [0.2], "bounds": (0, 1), "steps": 5, "restarts": 1, "adaptive": False}
    found = {finding.check: finding for finding in evaluate(model, (x, y), **options).findings}
    assert found["gradient-agreement"].verdict == "ok", found["gradient-agreement"]


def test_a_margin_that_falls_only_just_before_the_boundary_is_noticed(small_net, digits):
    found = verdicts(Wrapped(small_net, after=moat), digits, steps=5, adaptive=False)
    assert found["boundary-jump"].verdict == "distrust"
    assert found["boundary-jump"].evidence["median_left_at_nine_tenths_of_the_way"] > 0.95
    assert found["gradient-agreement"].verdict == "ok"


def test_a_backward_pass_that_points_downhill_is_noticed(small_net, digits):
    found = verdicts(Wrapped(small_net, before=LyingGradient.apply), digits)
    assert found["loss-rises"].verdict == "distrust"


def test_masked_gradients_are_beaten_by_blind_search(small_net, digits):
    staircase = Wrapped(small_net, before=lambda x: (x * 8).round() / 8)
    found = verdicts(staircase, digits, norms="linf", epsilons=[0.1, 0.15, 0.2])
    assert found["gradient-masking"].verdict in ("distrust", "warning")
    downhill = Wrapped(small_net, before=LyingGradient.apply)
    found = verdicts(downhill, digits, norms="linf", epsilons=[0.1, 0.15, 0.2], adaptive=False)
    assert found["gradient-masking"].verdict == "distrust"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_search_that_is_cut_short_is_noticed(small_net, digits, norm):
    epsilons = {"l2": [0.3, 0.5, 0.7, 0.9], "linf": [0.05, 0.1, 0.15]}[norm]
    found = verdicts(small_net, digits, norms=norm, epsilons=epsilons, steps=2, restarts=1)["convergence"]
    assert found.verdict in ("warning", "distrust")
    evidence = found.evidence
    assert (evidence["steps_used"], evidence["restarts_used"]) == (2, 1)
    assert evidence["samples_broken_nearer"] >= 2
    assert evidence["median_distance_of_the_longer_search"] < evidence["median_distance_found"]
    assert f"breaks {evidence['samples_broken_nearer']} of {evidence['samples']} samples" in found.summary
    assert " 0 " not in found.summary


@pytest.mark.parametrize(
    ("sizes", "count", "verdict"),
    [
        ({"steps": 5, "restarts": 1}, 1, "ok"),
        ({"steps": 5, "restarts": 1}, 2, "warning"),
        ({}, 3, "ok"),
        ({}, 4, "warning"),
    ],
)
def test_two_searches_of_one_length_may_each_miss_a_few_errors(small_net, digits, monkeypatch, sizes, count, verdict):
    left = [count]

    def breaks_a_few(subject, x, target, *, epsilon=None, **options):
        few = np.full(len(x), np.inf)
        if epsilon is not None:
            few[: left[0]] = 0.0
            left[0] -= int((few == 0).sum())
        return SimpleNamespace(distance=few)

    monkeypatch.setattr(_search_checks, "run_solver", breaks_a_few)
    monkeypatch.setattr(_run, "CHECKS", tuple(check for check in _run.CHECKS if check.name == "convergence"))
    x, y = digits
    result = evaluate(small_net, (x[:24], y[:24]), norms="linf", epsilons=[0.05, 0.1], average=0, **sizes)
    (found,) = result.findings
    assert found.verdict == verdict
    assert found.evidence["samples_broken_nearer"] == count


def test_a_search_that_missed_much_is_not_to_be_trusted(small_net, digits, monkeypatch):
    def overshot(model, x, target, **options):
        # As a solver does that has not arrived: errors, but farther away than they need to be.
        solution = minimum_norm(model, x, target, **options)
        if options["steps"] > 10:
            return solution
        points = (x + 1.5 * (solution.perturbed - x)).clamp(0, 1)
        return Solution(points, solution.losses, solution.success, solution.distances)

    def nothing(model, x, target, **options):
        if options["steps"] > 10:
            return worst_case(model, x, target, **options)
        return Solution(x, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool), torch.full((len(x),), np.inf))

    monkeypatch.setattr(_solver, "minimum_norm", overshot)
    monkeypatch.setattr(_solver, "worst_case", nothing)
    found = verdicts(small_net, digits, epsilons=[0.3, 0.5, 0.7, 0.9], steps=4)["convergence"]
    assert found.verdict == "distrust"
    assert found.evidence["samples_broken_nearer"] == found.evidence["samples"] == 16


def test_an_accuracy_that_never_falls_is_noticed(digits):
    x, y = digits
    x, y = x[y == 3][:20], y[y == 3][:20]

    def constant(x):
        return torch.eye(10)[3] + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)

    result = evaluate(constant, (x, y), epsilons=[0.5], steps=5, restarts=1)
    assert {f.check: f.verdict for f in result.findings}["large-epsilon"] == "distrust"


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (lambda out: 1000 * out, "warning"),
        (lambda out: out.softmax(dim=1), "warning"),
        (lambda out: out + 1e8, "distrust"),
        (lambda out: 1e-4 * out, "ok"),
    ],
    ids=["large", "probabilities", "offset", "small"],
)
def test_logits_that_float32_cannot_tell_apart_are_noticed(small_net, digits, after, verdict):
    assert verdicts(Wrapped(small_net, after=after), digits)["saturation"].verdict == verdict


def test_outputs_that_pass_no_gradient_on_are_not_called_saturated(small_net, digits):
    found = verdicts(Wrapped(small_net, before=lambda x: (x * 4).round() / 4), digits)
    assert found["saturation"].verdict == "ok"


def test_labels_in_another_order_are_noticed(small_net, digits):
    x, y = digits
    result = evaluate(small_net, (x[:40], (y[:40] + 1) % 10), epsilons=[0.5], steps=5, restarts=1)
    assert {f.check: f.verdict for f in result.findings}["clean-performance"] == "warning"


def test_a_point_that_is_no_error_when_asked_again_is_not_counted(small_net, digits, monkeypatch):
    from rai_toolbox.perturbations import minimum_norm
    from rai_toolbox.robustness.attack import _solver

    def boastful(model, x, target, **options):
        solution = minimum_norm(model, x, target, **options)
        return type(solution)(x + 1e-6, solution.losses, torch.ones_like(solution.success), 0 * solution.distances)

    monkeypatch.setattr(_solver, "minimum_norm", boastful)
    x, y = digits
    result = evaluate(small_net, (x[:20], y[:20]), epsilons=[0.01], steps=5, restarts=1)
    assert result.curves["l2"].points[1].value == result.curves["l2"].points[0].value
    finding = next(finding for finding in result.findings if finding.check == "verification")
    assert finding.verdict == "distrust"


@pytest.mark.parametrize(("bounds", "how_far"), [((-1.0, 1.0), 2.5), (None, 1.2)], ids=["bounds", "ball"])
def test_a_point_out_of_the_bounds_or_the_ball_is_not_counted(half_plane, blobs, monkeypatch, bounds, how_far):
    def reaches_too_far(model, x, target, **options):
        over = x - how_far * (x.abs() + 0.5) * x.sign()
        ones = torch.ones(len(x))
        return Solution(over, ones, ones.bool(), 0 * ones)

    def finds_nothing(model, x, target, **options):
        zeros = torch.zeros(len(x))
        return Solution(x.clone(), zeros, zeros.bool(), zeros + torch.inf)

    monkeypatch.setattr(_solver, "worst_case", reaches_too_far)
    monkeypatch.setattr(_solver, "minimum_norm", reaches_too_far if bounds else finds_nothing)
    result = evaluate(half_plane, blobs, epsilons=[0.5], bounds=bounds, steps=5, restarts=1, adaptive=False, average=0)
    assert [point.value for point in result.curves["l2"].points] == [1.0, 1.0]
    assert np.isinf(result.distance["l2"]).all()
    assert {finding.check: finding.verdict for finding in result.findings}["verification"] == "distrust"


def test_regression_faults_are_noticed():
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    y = x.sum(axis=1)
    torch.manual_seed(0)
    sound = nn.Linear(5, 1)
    with torch.no_grad():
        sound.weight.fill_(1.0)
        sound.bias.zero_()

    def found(model):
        result = evaluate(model, (x, y), task="regression", steps=20, restarts=1)
        return {finding.check: finding.verdict for finding in result.findings}

    assert "distrust" not in found(sound).values()
    assert "warning" not in found(sound).values()
    assert found(Wrapped(sound, before=torch.round))["zero-gradients"] == "distrust"
    assert found(Wrapped(sound, before=lambda x: x + torch.randn_like(x)))["random-model"] == "distrust"
    assert found(Wrapped(sound, before=LyingGradient.apply))["loss-rises"] == "distrust"


def test_every_check_has_its_text_in_the_report_and_in_the_documentation():
    from rai_toolbox.robustness.report._report import guidance
    from rai_toolbox.robustness.run._run import CHECKS

    assert set(guidance()) == {check.name for check in CHECKS}
    for text in guidance().values():
        assert "What it means." in text
        assert "What to do." in text


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l0"])
def test_checks_survive_that_every_sample_is_wrong_and_say_what_is_likely(small_net, digits, norm):
    x, _ = (torch.from_numpy(part) for part in digits)
    x, y = x[:30], (small_net(x[:30]).argmax(dim=1) + 1) % 10
    result = evaluate(small_net, (x, y), norms=norm, steps=3, restarts=1)
    found = {finding.check: finding for finding in result.findings}
    assert result.curves[norm].points[0].value == 0
    assert not any("could not be made" in finding.summary for finding in result.findings)
    assert "label -1" in found["clean-performance"].summary
    assert {"random-model", "transfer", "large-epsilon"} <= set(result.unmade)
    assert "clean-performance" not in result.unmade


def test_a_model_that_always_says_one_class_is_told_about_preprocessing(digits):
    x, y = digits
    x, y = x[y != 3][:40], y[y != 3][:40]

    def constant(x):
        return torch.eye(10)[3] + 0.0 * x.flatten(1).sum(dim=1, keepdim=True)

    result = evaluate(constant, (x, y), epsilons=[0.5], steps=3, restarts=1)
    summary = {finding.check: finding.summary for finding in result.findings}["clean-performance"]
    assert "class 3" in summary
    assert "preprocessing" in summary


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_far_beyond_all_errors_does_not_make_an_honest_gradient_doubtful(small_net, digits, norm):
    far = {"linf": 1.0, "l2": 8.0}[norm]
    found = verdicts(small_net, digits, norms=norm, epsilons=[far], budget="quick")
    assert found["data-fit"].verdict == found["gradient-agreement"].verdict == "ok"


def test_radii_and_statistics_in_other_units_than_the_data_are_noticed(small_net, digits):
    fit = verdicts(small_net, digits, norms="linf", epsilons=[8.0], steps=2)["data-fit"]
    assert fit.verdict == "warning"
    assert fit.summary.startswith("Epsilon 8 (linf) turns any sample into any other, as 1 does")
    x, y = digits
    for of, scale, verdict in (
        ("normalize:0.3/0.4", 1, "ok"), ("normalize:0.3/0.4", 255, "warning"), ("normalize:77/100", 1, "warning"),
    ):  # fmt: skip
        found = verdicts(small_net, (x * scale, y), bounds=(0, scale), preprocess=load_preprocess(of), steps=2)
        assert found["data-fit"].verdict == verdict
        assert ("Normalized, the images lie in" in found["data-fit"].summary) == (verdict == "warning")


def test_a_check_that_the_model_breaks_is_counted_as_not_made(small_net, digits):
    class NoSingles(nn.Module):
        def forward(self, x):
            if len(x) == 1:
                raise ValueError("batches only")
            return small_net(x)

    x, y = digits
    result = evaluate(NoSingles(), (x[:6], y[:6]), epsilons=[0.5], steps=3, restarts=1)
    assert "batch-dependence" in result.unmade
