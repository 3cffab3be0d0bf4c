"""`minimum_norm` beside optima that are known: mixed-integer programs of small ReLU networks, linear models in a box.

References
----------
.. [1] V. Tjeng, K. Xiao, R. Tedrake, "Evaluating robustness of neural networks with mixed integer programming",
   ICLR 2019.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rai_toolbox.perturbations import minimum_norm

LOADERS = {"wine": load_wine, "breast_cancer": load_breast_cancer, "digits": load_digits}


def trained(name: str, hidden: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of one hidden layer (none: linear), in float64, and data in [0, 1]."""
    raw = LOADERS[name]()
    span = np.ptp(raw.data, axis=0)
    x = torch.tensor((raw.data - raw.data.min(0)) / np.where(span > 0, span, 1.0), dtype=torch.float64)
    y = torch.tensor(raw.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = [x.shape[1], hidden, len(raw.target_names)] if hidden else [x.shape[1], len(raw.target_names)]
        model = nn.Sequential()
        for before, after in pairwise(sizes):
            model.extend([nn.Linear(before, after), nn.ReLU()])
        model = model[:-1].double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    right = (model(x).argmax(1) == y).nonzero()[:, 0]
    some = right[torch.linspace(0, len(right) - 1, 5).long()]
    return model.eval(), x[some], y[some]


def exact(model: nn.Sequential, x: NDArray, label: int, norm: str) -> float:
    """The distance of the nearest point of [0, 1]^d where another logit equals the label's or exceeds it."""
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)]
    weight, bias = layers[-1]
    others = [k for k in range(len(bias)) if k != label]
    return min(_nearest(layers, x, weight[k] - weight[label], float(bias[k] - bias[label]), norm) for k in others)


def _nearest(layers: list[tuple[NDArray, NDArray]], x: NDArray, row: NDArray, offset: float, norm: str) -> float:
    d, h = len(x), len(layers[0][1]) if len(layers) > 1 else 0
    # The variables: the point; the activations; whether each is on; and each entry's change.
    n = 2 * d + 2 * h
    point, active, on, change = np.arange(d), d + np.arange(h), d + h + np.arange(h), d + 2 * h + np.arange(d)
    low, high = np.zeros(n), np.ones(n)
    high[active] = np.inf
    rules: list[tuple[NDArray, NDArray, NDArray]] = []

    def rule(parts: list[tuple[NDArray, NDArray]], least: NDArray, most: NDArray) -> None:
        matrix = np.zeros((len(least), n))
        for columns, values in parts:
            matrix[:, columns] += values
        rules.append((matrix, least, most))

    if h:
        w, b = layers[0]
        least, most = b + np.minimum(w, 0).sum(1), b + np.maximum(w, 0).sum(1)
        least, most = np.minimum(least, 0), np.maximum(most, 0)
        forever, eye = np.full(h, np.inf), np.eye(h)
        rule([(active, eye), (point, -w)], b, forever)
        rule([(active, eye), (point, -w), (on, -np.diag(least))], -forever, b - least)
        rule([(active, eye), (on, -np.diag(most))], -forever, np.zeros(h))
    rule([(active if h else point, row[None])], np.array([-offset]), np.array([np.inf]))
    # In Linf one change serves all entries.
    size = np.eye(d) if norm == "l1" else np.tile(np.eye(d)[:1], (d, 1))
    rule([(point, np.eye(d)), (change, -size)], np.full(d, -np.inf), x)
    rule([(point, np.eye(d)), (change, size)], x, np.full(d, np.inf))
    cost = np.zeros(n)
    cost[change if norm == "l1" else change[:1]] = 1
    integer = np.zeros(n)
    integer[on] = 1
    solved = milp(
        cost, integrality=integer, bounds=Bounds(low, high), constraints=[LinearConstraint(*one) for one in rules],
        options={"mip_rel_gap": 1e-6, "time_limit": 30},
    )  # fmt: skip
    if solved.status == 2:
        return np.inf
    assert solved.success, solved.message
    return float(solved.fun)


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize(
    ("name", "hidden"), [("wine", 12), ("breast_cancer", 10), ("digits", 10), ("wine", 0), ("digits", 0)]
)
def test_the_nearest_error_is_the_known_one_and_never_nearer(name, hidden, norm):
    model, x, y = trained(name, hidden)
    found = minimum_norm(model, x, y, norm=norm, bounds=(0.0, 1.0)).distances
    known = torch.tensor([exact(model, a.numpy(), int(b), norm) for a, b in zip(x, y, strict=True)])
    excess = found / known.double() - 1
    assert excess.min() > -1e-5, excess
    assert (excess < 1e-3).double().mean() == 1, excess


def test_changed_entries_of_a_linear_model_in_a_box_are_as_few_as_can_be():
    model, x, y = trained("wine", 0)
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
