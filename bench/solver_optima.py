"""The nearest error of a small ReLU network in a box, known exactly: mixed-integer programs, solved to the end.

    python bench/solver_optima.py           # `minimum_norm` beside it

A network is a chain of `nn.Linear` and `nn.ReLU`. An error found by anybody is an upper bound on the distance of the
nearest one, so only the part of the box within that distance is searched; there most units are always on or always off.

References
----------
.. [1] V. Tjeng, K. Xiao, R. Tedrake, "Evaluating robustness of neural networks with mixed integer programming",
   ICLR 2019.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rai_toolbox.perturbations import minimum_norm

LOADERS = {"wine": load_wine, "breast_cancer": load_breast_cancer, "digits": load_digits}
# The search goes a little further than the error found: one that is nearer than the optimum is to show.
_BEYOND = 1e-4
_GAP = 1e-6

_NETWORKS = (
    ("wine", (100,)), ("wine", (50, 50)), ("breast_cancer", (100,)), ("breast_cancer", (50, 50)), ("digits", (30,)),
    ("digits", (100,)), ("wine", ()), ("digits", ()),
)  # fmt: skip

Layers = list[tuple[NDArray, NDArray]]


def trained(name: str, hidden: tuple[int, ...], n: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network with hidden layers of these sizes, in float64, and n of the data in [0, 1] that it gets right."""
    raw = LOADERS[name]()
    span = np.ptp(raw.data, axis=0)
    x = torch.tensor((raw.data - raw.data.min(0)) / np.where(span > 0, span, 1.0), dtype=torch.float64)
    y = torch.tensor(raw.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential()
        for before, after in pairwise([x.shape[1], *hidden, len(raw.target_names)]):
            model.extend([nn.Linear(before, after), nn.ReLU()])
        model = model[:-1].double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    right = (model(x).argmax(1) == y).nonzero()[:, 0]
    some = right[torch.linspace(0, len(right) - 1, n).long()]
    return model.eval(), x[some], y[some]


def nearest_error(
    model: nn.Sequential, x: Tensor, label: int, norm: str, *, known: float = np.inf, seconds: float = 30.0
) -> float | None:
    """The distance of the nearest point of [0, 1]^d where another logit is at least the label's.

    Parameters
    ----------
    norm : {"linf", "l1"}
    known : float
        The distance of an error that was found. If it is nearer than the nearest, the answer is larger than it, or inf.
    seconds : float
        For all classes together.

    Returns
    -------
    float or None
        None: not known in this time.
    """
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)]
    weight, bias = layers[-1]
    base, end, nearest = x.numpy(), time.monotonic() + seconds, np.inf
    for other in set(range(len(bias))) - {label}:
        layer = weight[other] - weight[label], float(bias[other] - bias[label])
        reach = min(known * (1 + _BEYOND), nearest)
        found = _nearest(layers[:-1], *layer, base, norm, reach, max(0.1, end - time.monotonic()))
        if found is None:
            return None
        nearest = min(nearest, found)
    return nearest


@dataclass
class _Program:
    """Variables with bounds and linear rules between them, as they are added."""

    low: list[NDArray] = field(default_factory=list)
    high: list[NDArray] = field(default_factory=list)
    integer: list[NDArray] = field(default_factory=list)
    rules: list[tuple[list[tuple[NDArray, NDArray]], NDArray, NDArray]] = field(default_factory=list)
    size: int = 0

    def variables(self, low: NDArray, high: NDArray, integer: bool = False) -> NDArray:
        self.low.append(low)
        self.high.append(high)
        self.integer.append(np.full(len(low), int(integer)))
        self.size += len(low)
        return np.arange(self.size - len(low), self.size)

    def rule(self, parts: list[tuple[NDArray, NDArray]], least: NDArray, most: NDArray) -> None:
        """least ≤ the sum of matrix @ variables ≤ most."""
        self.rules.append((parts, least, most))

    def minimize(self, cost: NDArray, seconds: float) -> float | None:
        constraints = []
        for parts, least, most in self.rules:
            matrix = np.zeros((len(least), self.size))
            for columns, values in parts:
                matrix[:, columns] += values
            constraints.append(LinearConstraint(csr_array(matrix), least, most))
        weights = np.zeros(self.size)
        weights[cost] = 1
        solved = milp(
            weights, integrality=np.concatenate(self.integer), constraints=constraints,
            bounds=Bounds(np.concatenate(self.low), np.concatenate(self.high)),
            options={"mip_rel_gap": _GAP, "time_limit": seconds},
        )  # fmt: skip
        if solved.status == 2:
            return np.inf
        return float(solved.fun) if solved.status == 0 else None


def _nearest(
    hidden: Layers, row: NDArray, offset: float, base: NDArray, norm: str, reach: float, seconds: float
) -> float | None:
    program, d = _Program(), len(base)
    near = reach if np.isfinite(reach) else float(d)
    low, high = np.maximum(0, base - near), np.minimum(1, base + near)
    point, before = program.variables(low, high), base
    inputs = point
    for depth, (weight, bias) in enumerate(hidden):
        least, most = bias + _lowest(weight, low, high), bias - _lowest(-weight, low, high)
        if not depth and norm == "l1":
            # No entry can move as far as the ball reaches while another does.
            middle, span = bias + weight @ before, near * np.abs(weight).max(axis=1)
            least, most = np.maximum(least, middle - span), np.minimum(most, middle + span)
        inputs = _relu(program, inputs, weight, bias, least, most)
        low, high = np.maximum(0, least), np.maximum(0, most)
    program.rule([(inputs, row[None])], np.array([-offset]), np.array([np.inf]))
    # In Linf one change serves all entries.
    change = program.variables(*(np.full(d if norm == "l1" else 1, bound) for bound in (0.0, near)))
    size = np.eye(d) if norm == "l1" else np.ones((d, 1))
    program.rule([(point, np.eye(d)), (change, -size)], np.full(d, -np.inf), base)
    program.rule([(point, np.eye(d)), (change, size)], base, np.full(d, np.inf))
    if norm == "l1":
        program.rule([(change, np.ones((1, d)))], np.array([0.0]), np.array([near]))
    return program.minimize(change, seconds)


def _lowest(weight: NDArray, low: NDArray, high: NDArray) -> NDArray:
    return np.minimum(weight * low, weight * high).sum(axis=1)


def _relu(program: _Program, inputs: NDArray, weight: NDArray, bias: NDArray, least: NDArray, most: NDArray) -> NDArray:
    """Variables for max(0, weight @ inputs + bias), which lies in [least, most] before it is cut off at 0."""
    h = len(bias)
    active = program.variables(np.maximum(0, least), np.maximum(0, most))
    always, never = least >= 0, most <= 0
    eye, forever = np.eye(h), np.full(h, np.inf)
    on = ~never
    program.rule([(active, eye[on]), (inputs, -weight[on])], bias[on], np.where(always, bias, forever)[on])
    open_ = ~always & ~never
    if open_.any():
        count = int(open_.sum())
        switch = program.variables(np.zeros(count), np.ones(count), integer=True)
        lower, upper = least[open_], most[open_]
        program.rule(
            [(active, eye[open_]), (inputs, -weight[open_]), (switch, -np.diag(lower))],
            np.full(count, -np.inf), bias[open_] - lower,
        )  # fmt: skip
        program.rule([(active, eye[open_]), (switch, -np.diag(upper))], np.full(count, -np.inf), np.zeros(count))
    return active


def main() -> None:
    """Print how near the optimum `minimum_norm` comes, on the samples whose optimum is proven in time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=int, default=10, help="samples of each network")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the optimum of a sample")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network, units | norm | proven | within 0.1 % | largest excess | least excess |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, hidden in _NETWORKS:
        model, x, y = trained(name, hidden, options.data)
        for norm in ("linf", "l1"):
            found = minimum_norm(model, x, y, norm=norm, bounds=(0.0, 1.0)).distances
            known = [
                nearest_error(model, a, int(b), norm, known=float(d), seconds=options.seconds)
                for a, b, d in zip(x, y, found, strict=True)
            ]
            excess = np.array([float(d) / k - 1 for d, k in zip(found, known, strict=True) if k is not None])
            units = " + ".join(map(str, hidden)) or "linear"
            extremes = f"{excess.max():.1e} | {excess.min():.1e}" if len(excess) else " | "
            near = int((excess < 1e-3).sum())
            print(f"| {name}, {units} | {norm} | {len(excess)} of {len(x)} | {near} | {extremes} |", flush=True)


if __name__ == "__main__":
    main()
