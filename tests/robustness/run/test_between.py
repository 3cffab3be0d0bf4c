"""Between the reported radii the curve is no higher than the solver that tries samples there would leave it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rai_toolbox.perturbations import Solution, worst_case
from rai_toolbox.robustness import evaluate
from rai_toolbox.robustness.attack import _solver, _stages
from rai_toolbox.robustness.attack._grid import radii_between

QUICK = {"norms": "linf", "steps": 3, "restarts": 1, "diagnostics": False, "average": 0}


@pytest.mark.parametrize("grid", [(0.05, 0.1, 0.15, 0.2, 0.25, 0.3), (0.01, 0.5), (1.0, 7.0, 7.5)])
def test_the_radii_are_those_reported_and_a_hundred_more_at_most_that_leave_no_gap(grid):
    radii = np.array(radii_between("l2", grid))
    assert set(grid) <= set(radii.tolist())
    assert len(radii) <= 100 + len(grid)
    assert np.diff(radii, prepend=0).max() <= 0.0101 * grid[-1]
    assert np.diff(radii, prepend=0).min() > 1e-6 * grid[-1]


def test_a_radius_in_l0_is_a_whole_number_and_one_radius_stays_alone():
    assert radii_between("l0", (4.0, 8.0)) == tuple(range(1, 9))
    assert radii_between("l2", (0.5,)) == (0.5,)


@pytest.fixture
def oracle(monkeypatch):
    """Solvers of `HalfLine`: one misses by up to a tenth, the other nothing. And how often each sample was tried."""
    tried = {}

    def misses(model, x, target, **options):
        far = x[:, 0].abs() * (1 + 0.1 * torch.frac(1000 * x[:, 0].abs()))
        moved = x - far[:, None] * x.sign()
        return Solution(moved, far * 0, (far * 0).bool() | True, far)

    def finds(model, x, target, *, epsilon, **options):
        for value in x[:, 0].tolist():
            tried[value] = tried.get(value, 0) + 1
        broken = x[:, 0].abs() <= epsilon
        moved = torch.where(broken[:, None], x - epsilon[:, None].to(x) * x.sign(), x)
        return Solution(moved, epsilon * 0, broken, epsilon)

    monkeypatch.setattr(_solver, "worst_case", finds)
    return tried, lambda: monkeypatch.setattr(_solver, "minimum_norm", misses)


class HalfLine(torch.nn.Module):
    def forward(self, x):
        return torch.cat((-x, x), dim=1)


def curve_of(count):
    nearest = np.random.default_rng(count).uniform(0.76, 0.86, count).astype(np.float32)
    return nearest, evaluate(HalfLine(), (nearest[:, None], np.ones(count, np.int64)), **QUICK)


def test_the_curve_is_a_hundredth_of_the_largest_radius_away_from_what_can_be_broken_at_most(oracle):
    _, weak = oracle
    weak()
    nearest, result = curve_of(200)
    step = 0.01 * result.curves["linf"].points[-1].epsilon
    assert (result.distance["linf"] >= nearest - 1e-6).all()
    assert (result.distance["linf"] <= nearest + step + 1e-6).all()


def test_where_nothing_was_missed_each_sample_is_tried_once(oracle):
    tried, _ = oracle
    nearest, result = curve_of(100)
    np.testing.assert_allclose(result.distance["linf"], nearest, rtol=1e-3)
    assert sum(tried.values()) <= 1.05 * 100  # its own rounding puts an error beyond a radius


def test_of_a_search_that_is_cut_short_the_curve_between_the_radii_comes_down(small_net, digits, monkeypatch):
    data = digits[0][:80], digits[1][:80]
    result = evaluate(small_net, data, bounds=(0, 1), **QUICK)
    monkeypatch.setattr(_stages, "radii_between", lambda norm, grid: grid)
    before = evaluate(small_net, data, bounds=(0, 1), **QUICK)
    radii = torch.linspace(0, result.curves["linf"].points[-1].epsilon, 51)[1:]

    def above(one):
        broken = []
        for radius in radii.tolist():
            rows = np.flatnonzero(one.distance["linf"] > radius)
            found = worst_case(
                small_net, data[0][rows], data[1][rows], norm="linf", epsilon=radius, bounds=(0, 1), steps=3, restarts=1
            )
            broken.append(int(found.success.sum()) / 80)
        return max(broken)

    assert above(before) > 0.15
    assert above(result) < 0.5 * above(before)  # a search as short as this finds by chance


def test_of_a_random_model_each_reported_radius_has_a_rate(small_net, digits):
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return small_net(x + 0.01 * torch.randn_like(x))

    data = digits[0][:6], digits[1][:6]
    result = evaluate(Noisy(), data, epsilons=[0.1, 0.2, 0.4], norms="l2", steps=3, restarts=1, draws=20, average=0)
    assert np.isfinite(result.error_rate["l2"]).all()
