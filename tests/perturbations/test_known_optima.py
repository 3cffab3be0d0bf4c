"""`minimum_norm` beside known optima: mixed-integer programs of small ReLU networks, linear models in a box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from solver_optima import nearest_error, trained  # pyright: ignore[reportMissingImports]

from rai_toolbox.perturbations import _search, minimum_norm, worst_case

QUICK = [("wine", (12,), "linf"), ("breast_cancer", (10,), "linf"), ("wine", (), "l1"), ("wine", (12,), "l1")]
SLOW = [
    (name, hidden, norm)
    for name, hidden in (
        ("wine", (12,)), ("wine", (100,)), ("wine", (50, 50)), ("breast_cancer", (100,)),
        ("breast_cancer", (50, 50)), ("digits", (10,)),
        ("digits", ()), ("wine", ()),
    )
    for norm in ("linf", "l1")
    if (name, hidden, norm) not in QUICK
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hidden", "norm"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_the_nearest_error_is_the_known_one_and_never_nearer(name, hidden, norm):
    model, x, y = trained(name, hidden, 5)
    found = minimum_norm(model, x, y, norm=norm, bounds=(0.0, 1.0)).distances
    known = [
        nearest_error(model, a, int(b), norm, known=float(d)) for a, b, d in zip(x, y, found.tolist(), strict=True)
    ]
    proven = torch.tensor([one is not None for one in known])
    assert proven.sum() >= 3
    excess = found[proven] / torch.tensor([one for one in known if one is not None], dtype=torch.float64) - 1
    assert excess.min() > -1e-5, excess
    assert excess.max() < 1e-3, excess


def test_an_error_nearer_than_any_is_told_from_the_nearest():
    model, x, y = trained("wine", (12,), 1)
    nearest = nearest_error(model, x[0], int(y[0]), "linf")
    assert nearest_error(model, x[0], int(y[0]), "linf", known=0.9 * nearest) == float("inf")
    assert nearest_error(model, x[0], int(y[0]), "linf", known=1.1 * nearest) == pytest.approx(nearest, rel=1e-5)


def test_changed_entries_of_a_linear_model_in_a_box_are_as_few_as_can_be():
    model, x, y = trained("wine", (), 5)
    found = minimum_norm(model, x, y, norm="l0", bounds=(0.0, 1.0)).distances
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    for datum, label, distance in zip(x, y, found, strict=True):
        fewest = float("inf")
        for other in set(range(len(bias))) - {int(label)}:
            row = weight[other] - weight[label]
            gain = torch.maximum(row * (1 - datum), -row * datum).sort(descending=True).values.cumsum(0)
            across = (row @ datum + bias[other] - bias[label] + gain > 0).nonzero()
            fewest = min([fewest, *(across[:1, 0] + 1.0).tolist()])
        assert distance == fewest


def nearest_of_a_class(weight, bias, datum, wanted):
    """In Linf, for a linear model in [0, 1]: the distance at which the wanted class's logit is the largest, by LP."""
    others, d = [k for k in range(len(bias)) if k != wanted], len(datum)
    rise = weight[others] - weight[wanted]
    rules = np.block(
        [[rise, np.zeros((len(others), 1))], [np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]]
    )
    most = np.concatenate([bias[wanted] - bias[others] - rise @ datum, np.zeros(2 * d)])
    box = [*zip(-datum, 1 - datum, strict=True), (0, None)]
    return linprog(np.r_[np.zeros(d), 1.0], A_ub=rules, b_ub=most, bounds=box).fun


def test_where_several_classes_have_to_be_passed_at_once_the_nearest_point_is_that_of_a_linear_program():
    model, x, y = trained("wine", (), 16)
    wanted = (y + 1 + torch.arange(16) % 2) % 3
    layer = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    known = torch.tensor(
        [nearest_of_a_class(*layer, *one) for one in zip(x.numpy(), wanted.tolist(), strict=True)], dtype=torch.float64
    )
    found = minimum_norm(model, x, wanted, norm="linf", bounds=(0.0, 1.0), targeted=True).distances
    assert (found / known).min() > 1 - 1e-6
    assert (found / known).max() < 1.005
    fixed = worst_case(model, x, wanted, norm="linf", epsilon=1.05 * known, bounds=(0.0, 1.0), targeted=True)
    assert fixed.success.all()


def least_l2_beyond_thresholds(weight, needed):
    """The least L2 norm of d in [0, 1] for which the sum of weight * max(0, d - 1/2) is `needed`."""
    weight, least = np.sort(weight)[::-1], np.inf
    for count in range(1, len(weight) + 1):
        used = weight[:count]
        low, high = 0.0, 1 / used[-1]
        for _ in range(60):
            middle = (low + high) / 2
            enough = used @ (np.clip(middle * used, 0.5, 1) - 0.5) >= needed
            low, high = (low, middle) if enough else (middle, high)
        if used.sum() / 2 >= needed:
            least = min(least, np.linalg.norm(np.clip(high * used, 0.5, 1)))
    return least


def test_entries_that_matter_only_far_from_the_datum_are_found_in_l2():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(100, generator=generator) + 0.5
    x = 1e-4 * torch.rand(12, 100, generator=generator)

    def model(x):
        return (x - 0.5).relu() @ weight[:, None] - 3

    found = minimum_norm(model, x, torch.zeros(12), norm="l2", bounds=(0, 1), margin=lambda output, _: output[:, 0])
    excess = found.distances / least_l2_beyond_thresholds(weight.double().numpy(), 3) - 1
    assert excess.min() > -1e-3
    # With gradients at the points alone it is 0.10: where an entry has not passed its threshold they are zero.
    assert excess.mean() < 0.085


def test_in_l1_walks_start_where_one_to_three_entries_of_the_nearest_point_are_put_back(digits, monkeypatch):
    real, seen = _search.descend, set()

    def watched(problem, nearest, rows, start, losses, **how):
        differ = start() != nearest.x[rows]
        put_back = (start() == problem.data[rows])[differ].all() and how["radius"] is not None
        seen.update(differ.sum(dim=1).tolist() if put_back else [])
        return real(problem, nearest, rows, start, losses, **how)

    monkeypatch.setattr(_search, "descend", watched)
    minimum_norm(digits.model, digits.x[:4], digits.y[:4], norm="l1", bounds=(0, 1))
    assert seen - {0} == {1, 2, 3}


@pytest.mark.parametrize(("norm", "most"), [("l2", 130), ("l1", 105)])
def test_classes_that_a_linear_model_finds_far_take_few_passes(digits, norm, most):
    passes = 0

    def model(x):
        nonlocal passes
        passes += len(x)
        return digits.model(x)

    def after_the_classes(number, found):
        return number == 8

    minimum_norm(model, digits.x[:20], digits.y[:20], norm=norm, bounds=(0, 1), callback=after_the_classes)
    assert passes <= most * 20
