"""The guarantees of `worst_case` and `minimum_norm`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rai_toolbox.perturbations import Solution, minimum_norm, worst_case
from rai_toolbox.perturbations.losses import cross_entropy, rescaled_cross_entropy

NORMS: list[Any] = ["l1", "l2", "linf", "l0"]
RADII = {"l1": 1.5, "l2": 0.5, "linf": 0.1, "l0": 3}
quick_worst = partial(worst_case, steps=15, restarts=4)
quick_minimum = partial(minimum_norm, steps=15, restarts=4)


def size(delta: torch.Tensor, norm: str) -> torch.Tensor:
    """In float64, by other means than the library's."""
    delta = delta.double().flatten(1)
    if norm == "l0":
        return (delta != 0).sum(1).double()
    return delta.norm(p={"l1": 1, "l2": 2, "linf": torch.inf}[norm], dim=1)


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    shape=st.sampled_from([(4,), (1, 9), (2, 3, 2), (1,)]),
    classes=st.sampled_from([1, 2, 3, 5, 12]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    share=st.floats(0, 1.5),
    box=st.sampled_from([None, "numbers", "per feature", "one-sided"]),
    seed=st.integers(0, 2**32),
)
def test_what_is_returned_lies_in_ball_and_box_and_is_reported_as_it_is(
    norm, dtype, shape, classes, scale, share, box, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(5, *shape, generator=generator) * scale).to(dtype)
    weight = torch.randn(x[0].numel(), classes, generator=generator).to(dtype)
    y = torch.randint(max(classes, 2), (5,), generator=generator)
    bounds = {
        None: None,
        "numbers": (x.min().item(), x.max().item()),
        "per feature": (x.amin(0), x.amax(0)),
        "one-sided": (x.min().item(), torch.inf),
    }[box]
    epsilon = torch.linspace(0, 1, 5, dtype=torch.float64) * share * (scale if norm != "l0" else x[0].numel())

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ weight

    found = worst_case(model, x, y, norm=norm, epsilon=epsilon, bounds=bounds, steps=6, restarts=3)
    nearest = minimum_norm(model, x, y, norm=norm, bounds=bounds, steps=8, restarts=3)
    for solution in (found, nearest):
        assert solution.perturbed.dtype == dtype
        assert solution.perturbed.shape == x.shape
        if bounds is not None:
            low, high = (torch.as_tensor(b, dtype=dtype) for b in bounds)
            assert ((solution.perturbed >= low) & (solution.perturbed <= high)).all()
        output = model(solution.perturbed).float()
        predicted = (output[:, 0] > 0).long() if classes == 1 else output.argmax(1)
        assert torch.equal(solution.success, predicted != y)
    measured = size(found.perturbed.double() - x.double(), norm)
    assert (measured <= epsilon * (1 + 1e-14)).all()
    torch.testing.assert_close(found.distances, measured, rtol=1e-12, atol=0)
    hit = nearest.success
    torch.testing.assert_close(
        nearest.distances[hit], size(nearest.perturbed.double() - x.double(), norm)[hit], rtol=1e-12, atol=0
    )
    assert nearest.distances[~hit].isinf().all()
    assert torch.equal(nearest.perturbed[~hit], x[~hit])


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_is_beaten_at_the_analytic_distance_and_not_before(norm):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    z = x @ weight
    y = (z > 0).long()
    # The dual norm; L0: how many of the largest terms it takes when an entry may go anywhere in [-4, 4].
    dual = {"l1": torch.inf, "l2": 2, "linf": 1}.get(norm)
    bounds = None
    if dual is not None:
        exact = z.abs() / weight.norm(p=dual)
    else:
        bounds = (-4.0, 4.0)
        direction = -torch.sign(z)[:, None] * weight.sign()
        gains = ((4 * direction - x) * weight).abs().sort(1, descending=True).values.cumsum(1)
        exact = (gains <= z.abs()[:, None]).sum(1).double() + 1
    found = minimum_norm(lambda x: x @ weight, x, y, norm=norm, bounds=bounds)
    assert found.success.all()
    assert (found.distances >= exact * (1 - 1e-9)).all()
    assert (found.distances <= exact * (1.002 if dual is not None else 1)).all()
    if dual is not None:
        for factor, expected in ((0.995, False), (1.01, True)):
            result = worst_case(lambda x: x @ weight, x, y, norm=norm, epsilon=factor * exact)
            assert (result.success == expected).all()


def test_in_a_box_the_fixed_l1_budget_reaches_the_exact_distance():
    torch.manual_seed(0)
    x, weight = torch.rand(16, 100), torch.randn(100)
    z = (x - 0.5) @ weight
    # Entries are used up one after the other, those of the largest weight first.
    order = weight.abs().argsort(descending=True)
    slope = weight.abs()[order].double()
    room = torch.where((z[:, None] * weight > 0), x, 1 - x)[:, order].double()
    gain = slope * room
    left = z.abs().double()[:, None] - (gain.cumsum(1) - gain)
    exact = torch.minimum((left / slope).clamp_min(0), room).sum(1)
    solve = partial(
        worst_case, lambda x: (x - 0.5) @ weight, x, (z > 0).long(), norm="l1", bounds=(0, 1), restarts=3
    )  # fmt: skip
    assert not solve(epsilon=0.99 * exact).success.any()
    assert solve(epsilon=1.002 * exact).success.all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_curve_of_minimum_norm_and_the_fixed_budget_agree(digits, norm):
    model, x, y = digits
    curve = minimum_norm(model, x, y, norm=norm, bounds=(0, 1), steps=30)
    assert curve.success.all()
    fixed = worst_case(model, x, y, norm=norm, epsilon=RADII[norm], bounds=(0, 1), steps=30)
    accuracy = 1 - fixed.success.double().mean()
    assert 0.1 < accuracy < 0.9
    excess = accuracy - curve.robust_accuracy(RADII[norm])
    assert abs(excess) <= 2.5 / len(x)
    if norm in ("l1", "l0"):  # it searches as minimum_norm does, so that it may not find less
        assert excess <= 0


def test_without_bounds_there_is_no_end_to_how_far_away_the_boundary_may_be():
    x = torch.tensor([[1e-3], [0.5], [-2.0]], dtype=torch.float64)
    found = minimum_norm(lambda x: x[:, 0] - 3.0, x, torch.zeros(3, dtype=torch.long), norm="l2")
    torch.testing.assert_close(found.distances, 3.0 - x[:, 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_scale_of_the_logits_does_not_matter(digits, norm):
    model, x, y = digits
    shares = {
        scale: quick_worst(lambda x, scale=scale: model(x) * scale, x, y, norm=norm, epsilon=RADII[norm], bounds=(0, 1))
        .success.double()
        .mean()
        .item()
        for scale in (1e-4, 1, 100, 1e4)
    }
    assert max(shares.values()) - min(shares.values()) <= 0.01, shares


def test_the_rescaled_cross_entropy_stays_useful_where_the_plain_one_saturates(digits):
    model, x, y = digits

    def accuracy(criterion, scale):
        found = worst_case(
            lambda x: model(x) * scale, x, y, norm="linf", epsilon=0.1, bounds=(0, 1), criterion=criterion, steps=20,
            restarts=1,
        )  # fmt: skip
        return 1 - found.success.double().mean().item()

    assert accuracy(cross_entropy, 1e4) > accuracy(cross_entropy, 1) + 0.1
    assert accuracy(rescaled_cross_entropy, 1e4) == pytest.approx(accuracy(rescaled_cross_entropy, 1), abs=0.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("solver", ["worst_case", "minimum_norm"])
def test_a_result_does_not_depend_on_company_order_or_batch_size(digits, norm, solver):
    _, x, y = digits
    x, y = x[:12].double(), y[:12]
    weight = torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x: torch.Tensor) -> torch.Tensor:  # the same arithmetic for a row whatever the batch: one entry at a time
        output = torch.zeros(len(x), 10, dtype=x.dtype)
        for i in range(0, 64):
            output = output + x[:, i : i + 1] * weight[i]
        return output.tanh()

    y = model(x).argmax(1)

    def solve(x, y, **kwargs) -> Solution:
        options = {"norm": norm, "bounds": (0, 1), "steps": 8, "restarts": 3, **kwargs}
        if solver == "worst_case":
            return worst_case(model, x, y, epsilon=RADII[norm] / 4 if norm != "l0" else 1, **options)
        return minimum_norm(model, x, y, **options)

    whole = solve(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    for other, rows in (
        (solve(x, y, batch_size=5), slice(None)),
        (solve(x[order], y[order]), order),
        (solve(x[3:4], y[3:4]), slice(3, 4)),
    ):
        torch.testing.assert_close(other.perturbed, whole.perturbed[rows], rtol=0, atol=1e-9)
        assert torch.equal(other.success, whole.success[rows])


@pytest.mark.parametrize("solver", [partial(quick_minimum, restarts=12), partial(quick_worst, epsilon=0.4)])
def test_the_same_generator_gives_the_same_and_the_users_numbers_are_untouched(digits, solver):
    model, x, y = digits
    x, y = x[:16], y[:16]
    state = torch.get_rng_state()
    solve = partial(solver, model, x, y, norm="l2", bounds=(0, 1))
    first, second = (solve(generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    other = solve(generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.perturbed, second.perturbed)
    assert not torch.equal(first.perturbed, other.perturbed)
    assert torch.equal(solve().perturbed, solve().perturbed)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("solver", [quick_minimum, partial(quick_worst, epsilon=0.1)])
def test_the_model_is_as_it_was_also_after_an_exception(failure, solver):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model.train()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    calls = 0

    def hook(module, args):
        nonlocal calls
        calls += 1
        if failure and calls == 5:
            raise failure

    model.register_forward_pre_hook(hook)
    x, y = torch.rand(6, 4, requires_grad=True), torch.arange(6) % 3
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(failure) if failure else torch.no_grad():
        solver(model, x, y, norm="l2")
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert x.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_neither_wins_nor_spreads(digits, norm):
    model, x, y = digits
    x, y = x[:10], y[:10]

    def poisoned(x: torch.Tensor) -> torch.Tensor:  # NaN wherever the first pixel moves, for every other datum
        output = model(x)
        sick = (x[:, :1] != 0) | (x[:, 1:2] > 0.3)
        return output * torch.where(sick, torch.nan, 1.0)  # so that the gradients are NaN too

    for solution in (
        quick_worst(poisoned, x, y, norm=norm, epsilon=RADII[norm], bounds=(0, 1)),
        quick_minimum(poisoned, x, y, norm=norm, bounds=(0, 1)),
    ):
        assert solution.perturbed.isfinite().all()
        assert not (solution.losses.isnan() & ~poisoned(x).isnan().any(1)).any()
        hit = solution.success
        assert not solution.losses[hit].isnan().any()
        assert (poisoned(solution.perturbed[hit]).argmax(1) != y[hit]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_data_whose_losses_and_gradients_are_nan_do_not_touch_the_others(digits, norm):
    model, x, y = digits
    x, y = x[:12].clone(), y[:12]
    x[::2, 0] = 1.0
    fixed = torch.arange(64) == 0

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return model(x) * torch.where(x[:, :1] > 0.5, torch.nan, 1.0)

    def solve(solver, rows) -> Solution:
        bounds = torch.where(fixed, x[rows], 0.0), torch.where(fixed, x[rows], 1.0)
        return solver(poisoned, x[rows], y[rows], norm=norm, bounds=bounds)

    for solver in (partial(quick_worst, epsilon=2 * RADII[norm]), quick_minimum):
        together, alone = solve(solver, slice(None)), solve(solver, slice(1, None, 2))
        assert not together.success[::2].any()
        assert torch.equal(together.success[1::2], alone.success)
        torch.testing.assert_close(together.losses[1::2], alone.losses, rtol=1e-3, atol=1e-3)
        assert alone.success.any()


def test_what_is_returned_is_the_best_seen_and_solved_samples_leave_the_batch(digits):
    model, x, y = digits
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        output = model(x)
        seen.append((x.detach().clone(), output.detach()))
        return output

    found = worst_case(
        watched, x, y, norm="linf", epsilon=0.1, bounds=(0, 1), steps=20, restarts=3, early_stop=False,
        criterion=cross_entropy,
    )  # fmt: skip
    best = torch.stack([cross_entropy(output, y) for _, output in seen[:-1]]).amax(0)
    torch.testing.assert_close(found.losses, best)
    seen.clear()
    found = quick_worst(watched, x, y, norm="linf", epsilon=0.1, bounds=(0, 1))
    sizes = [len(x) for x, _ in seen[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == (~found.success).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_work(digits, dtype):
    model, x, y = digits
    full = quick_worst(model, x, y, norm="linf", epsilon=0.1, bounds=(0, 1))
    with torch.autocast("cpu", dtype=dtype):
        found = quick_worst(model, x, y, norm="linf", epsilon=0.1, bounds=(0, 1))
        nearest = quick_minimum(model, x, y, norm="l2", bounds=(0, 1))
    assert found.perturbed.dtype == torch.float32
    assert abs(found.success.double().mean() - full.success.double().mean()) < 0.15
    assert nearest.success.double().mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_one_two_or_three_logits_series_and_regression_without_bounds(norm):
    torch.manual_seed(0)
    series = 30 * torch.randn(10, 1, 16)
    for logits in (1, 2, 3):
        model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(42, logits))
        output = model(series)
        y = (output[:, 0] > 0).long() if logits == 1 else output.argmax(1)
        found = quick_minimum(model, series, y, norm=norm)
        assert found.success.double().mean() > 0.8, (logits, found)
        epsilon = torch.where(found.success, 1.2 * found.distances + (norm == "l0"), 1.0)
        fixed = quick_worst(model, series, y, norm=norm, epsilon=epsilon, steps=40, restarts=8)
        assert (fixed.success | ~found.success).double().mean() >= (0.7 if norm == "l0" else 0.9)
    model = nn.Linear(5, 1)
    x = torch.randn(6, 5)
    y = model(x)[:, 0].detach()
    worst = quick_worst(model, x, y, norm=norm, epsilon=1.0)
    assert not worst.success.any()
    if norm != "l0":
        dual = {"l1": torch.inf, "l2": 2, "linf": 1}[norm]
        expected = model.weight.detach().norm(p=dual).square().expand(6)
        torch.testing.assert_close(worst.losses, expected, rtol=0.05, atol=0)
        nearest = minimum_norm(
            model, x, y, norm=norm, margin=lambda output, target: (output[:, 0] - target).abs() - 0.5
        )
        torch.testing.assert_close(nearest.distances, (0.5 / expected.sqrt()).double(), rtol=0.01, atol=0)


def test_targeted_reaches_the_class_and_frozen_features_stay(digits):
    model, x, y = digits
    aim = (y + 1) % 10
    found = quick_minimum(model, x, aim, norm="l2", bounds=(0, 1), targeted=True)
    assert found.success.double().mean() > 0.95
    assert torch.equal(model(found.perturbed).argmax(1) == aim, found.success)
    within = quick_worst(
        model, x, aim, norm="l2", epsilon=1.1 * found.distances.clamp(max=9), bounds=(0, 1), targeted=True
    )
    assert (within.success == found.success).double().mean() > 0.9
    frozen = torch.arange(64) % 2 == 0
    bounds = (torch.where(frozen, x, 0.0), torch.where(frozen, x, 1.0))
    for norm in NORMS:
        held = quick_worst(model, x, y, norm=norm, epsilon=RADII[norm], bounds=bounds, batch_size=20)
        assert torch.equal(held.perturbed[:, frozen], x[:, frozen])
        assert held.success.any()


def test_a_decision_that_no_gradient_leads_to_is_still_found(digits):
    model, x, y = digits

    def masked(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(model(x).argmax(1), 10) + 0 * x.sum(1, keepdim=True)

    found = quick_minimum(masked, x, y, norm="linf", bounds=(0, 1))
    assert found.success.double().mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_a_model_without_gradients_is_searched_at_random(digits, norm):
    model, x, y = digits

    def coarse(x: torch.Tensor) -> torch.Tensor:  # the data are multiples of 1/16
        return model(torch.round(16 * x) / 16) + 0 * x.sum(dim=1, keepdim=True)

    solve = partial(worst_case, data=x, target=y, norm=norm, epsilon=RADII[norm], bounds=(0, 1), steps=40, restarts=7)
    blind, seeing = (solve(m).success.double().mean().item() for m in (coarse, model))
    assert blind >= 0.45 * seeing
    images = solve(lambda x: coarse(x.flatten(1)), data=x.view(-1, 1, 8, 8))
    assert images.success.double().mean() >= 0.45 * seeing


def test_no_data_no_trouble():
    model = nn.Linear(3, 2)
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert worst_case(model, *empty, norm="l2", epsilon=1.0).perturbed.shape == (0, 3)
    assert minimum_norm(model, *empty, norm="l2").distances.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"norm": "l3"}, ValueError, "norm"),
        ({"epsilon": -1.0}, ValueError, "epsilon"),
        ({"epsilon": torch.ones(3)}, ValueError, "epsilon"),
        ({"epsilon": [0.1, 0.2]}, ValueError, r"minimum_norm\(.*\)\.robust_accuracy\(radii\), or call once per radius"),
        ({"bounds": (0, 0.1)}, ValueError, "outside the bounds"),
        ({"bounds": 3}, TypeError, "bounds"),
        ({"bounds": (1, 0)}, ValueError, "lower"),
        ({"target": torch.full((6,), 9)}, ValueError, r"\[0, 2\]"),
        ({"target": torch.zeros(5, dtype=torch.long)}, ValueError, "one row per datum"),
        ({"data": torch.zeros(6, 4, dtype=torch.long)}, TypeError, "floating point"),
        ({"model": lambda x: (x,)}, TypeError, "tensor"),
        ({"model": lambda x: x.sum()}, ValueError, "one row per datum"),
        ({"model": lambda x: x[:, :, None]}, ValueError, "logits"),
        ({"model": lambda x: x.detach()}, ValueError, "differentiably"),
        ({"model": lambda x: x.argmax(dim=1)}, TypeError, r"floating point logits or values; it returned torch\.int64"),
        ({"target": torch.zeros(6)}, ValueError, r"for class numbers give integers, target\.long\(\)"),
        ({"steps": 0}, ValueError, "steps"),
        ({"restarts": 1.5}, TypeError, "restarts"),
        ({"criterion": lambda output, target: output.sum()}, ValueError, "criterion"),
        ({"criterion": lambda output, target: output[:, :1]}, ValueError, r"criterion .* shape \(6,\).* \(6, 1\)"),
        ({"margin": lambda output, target: output[:, :1]}, ValueError, r"margin .* shape \(6,\).* \(6, 1\)"),
    ],
)
def test_an_error_names_the_argument(change, error, words):
    torch.manual_seed(0)
    arguments = {
        "model": nn.Linear(4, 3), "data": torch.rand(6, 4), "target": torch.zeros(6, dtype=torch.long), "norm": "l2",
        "epsilon": 0.1, **change,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        worst_case(arguments.pop("model"), arguments.pop("data"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize("solve", [minimum_norm, partial(worst_case, epsilon=0.01)])
def test_a_callback_that_returns_true_ends_the_solve_with_what_was_found(solve):
    told = []

    def stop(number, found):
        told.append(number)
        return number == 1

    data, target = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.long)
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
        model.bias.copy_(torch.tensor([2.0, 0, 0, 0]))
    found = solve(model, data, target, norm="l2", restarts=8, steps=5, callback=stop)
    assert told == [0, 1]
    assert found.perturbed.shape == data.shape


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("solver", ["worst_case", "minimum_norm"])
def test_no_datum_gets_more_than_a_thousand_passes_each_way(digits, norm, solver):
    model, x, y = digits
    # An entry that cannot move tells the data apart.
    name = torch.arange(8.0)[:, None]
    x, lower, upper = (torch.cat((name, part), 1) for part in (x[:8], torch.zeros(8, 64), torch.ones(8, 64)))
    forward, backward = torch.zeros(8, dtype=torch.long), torch.zeros(8, dtype=torch.long)

    def counted(points: torch.Tensor) -> torch.Tensor:
        number = points.detach()[:, 0].round().long()
        forward.add_(number.bincount(minlength=8))
        if points.requires_grad:
            points.register_hook(partial(went_back, number))
        return model(points[:, 1:])

    def went_back(number: torch.Tensor, grad: torch.Tensor) -> None:
        backward.add_(number.bincount(minlength=8))

    if solver == "worst_case":
        worst_case(counted, x, y[:8], norm=norm, epsilon=RADII[norm] / 3, bounds=(lower, upper))
    else:
        minimum_norm(counted, x, y[:8], norm=norm, bounds=(lower, upper))
    assert 100 < forward.max() <= 1000
    assert 100 < backward.max() <= 1000


@pytest.mark.parametrize(("steps", "restarts"), [(10, 1), (10, 2), (40, 1)])
def test_few_runs_of_many_classes_are_not_spent_on_ranking_them(steps, restarts):
    torch.manual_seed(0)
    model, x = nn.Linear(12, 200).double(), torch.randn(8, 12, dtype=torch.float64)
    y = model(x).argmax(dim=1)
    weight, margin = model.weight.detach(), model(x).detach()
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    for other in range(200):  # the nearest boundary of all classes, in closed form
        slope = (weight[other] - weight[y]).norm(dim=1)
        distance = (margin[torch.arange(8), y] - margin[:, other]) / slope
        best = torch.where(y == other, best, torch.minimum(best, distance))
    solution = minimum_norm(model, x, y, norm="l2", steps=steps, restarts=restarts)
    assert solution.success.all()
    assert (size(solution.perturbed - x, "l2") < 3 * best).all()
