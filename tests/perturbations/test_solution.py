"""What solvers return, and how users name what they ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from rai_toolbox.perturbations import minimum_norm, universal, worst_case

X = torch.tensor([[1.0, 0.0], [0.5, 0.1]])
Y = torch.tensor([0, 0])
MODEL = torch.nn.Identity()


def test_targets_without_a_decision_have_no_robust_accuracy() -> None:
    found = worst_case(MODEL, X, one_hot(Y, 2).float(), norm="linf", epsilon=0.3)
    assert not found.has_decision
    with pytest.raises(ValueError, match=r"class indices .*argmax"):
        found.robust_accuracy(0.3)
    assert worst_case(MODEL, X, Y, norm="linf", epsilon=0.3).robust_accuracy(0.3) == 0.5
    # a margin decides
    far = worst_case(
        MODEL, X, X, norm="linf", epsilon=0.3, margin=lambda output, target: (output - target).abs().amax(1) - 0.2
    )
    assert far.has_decision
    assert far.robust_accuracy(0.3) == 0.0


@pytest.mark.parametrize(
    ("name", "norm"),
    [("L2", "l2"), (2, "l2"), (2.0, "l2"), ("Linf", "linf"), ("inf", "linf"), (math.inf, "linf"), (1, "l1"), (0, "l0")],
)
def test_norms_have_several_names(name: Any, norm: Any) -> None:
    a = minimum_norm(MODEL, X, Y, norm=name, steps=10, restarts=1)
    b = minimum_norm(MODEL, X, Y, norm=norm, steps=10, restarts=1)
    assert torch.equal(a.perturbed, b.perturbed)
    c = worst_case(MODEL, X, Y, norm=name, epsilon=1.5, steps=5, restarts=1)
    d = worst_case(MODEL, X, Y, norm=norm, epsilon=1.5, steps=5, restarts=1)
    assert torch.equal(c.perturbed, d.perturbed)


@pytest.mark.parametrize("name", ["l3", 3, True, None, "two"])
def test_an_unknown_norm_is_told_which_there_are(name: Any) -> None:
    with pytest.raises(ValueError, match="'l1', 'l2', 'linf', 'l0', or an order"):
        worst_case(MODEL, X, Y, norm=name, epsilon=0.3)
    with pytest.raises(ValueError, match="or an order"):
        universal(MODEL, [(X, Y)], norm=name, epsilon=0.3)


def test_several_radii_are_told_about_minimum_norm() -> None:
    with pytest.raises(ValueError, match=r"minimum_norm\(\.\.\.\)\.robust_accuracy"):
        worst_case(MODEL, X, Y, norm="l2", epsilon=torch.tensor([0.1, 0.2, 0.3]))
