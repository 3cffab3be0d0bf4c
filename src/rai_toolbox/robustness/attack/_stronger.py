"""Attacks that do without the model's own gradient, on a batch: for models whose gradient is in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.perturbations.losses import misclassified
from rai_toolbox.robustness.attack._blackbox import random_search
from rai_toolbox.robustness.attack._bpda import BPDA
from rai_toolbox.robustness.attack._decisions import walk_along_boundary
from rai_toolbox.robustness.attack._kept import Kept
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._solver import NAME, CheckedResult, check_again, run_solver
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.attack._substitutes import by_differences, length_of_steps, with_gradient_of
from rai_toolbox.robustness.attack._twin import distill

#: The attacks, in the order in which they are run.
STRONGER = ("BPDA", "differences", "transfer", "decisions", "random search")

_QUERIES = 1000
# In linf a boundary point comes nearer with each estimate of the normal, but by little.
_ROUNDS = {"l1": 25, "l2": 25, "linf": 60}
_POOL = 256
# How often a sample goes through the model, about: most often for the differences.
_PASSES = 30_000


def stronger(
    subject: Subject, norm: Norm, batch: int, grid: Sequence[float], known: NDArray, width: float
) -> dict[str, Any]:
    """Return how far the nearest error is from each sample of a batch, by attacks without the model's own gradient.

    grid: the reported radii.
    known: the distance at which the solvers broke each sample; 0 where it is wrong from the start.
    width: of the data.

    Returns ``distance``, the least of all; ``by``, the attack that found it, empty where it was known; one array for
    each attack, under its name; and what a piece of a run holds.
    """
    subject.begin(_PASSES * int((known > 0).sum()))
    rows = np.flatnonzero(known > 0)
    by_attack = {name: np.where(known > 0, np.inf, 0.0) for name in STRONGER}
    by, errors, kept = np.full(len(known), "", NAME), np.zeros(len(known), np.int64), Kept(subject, batch)
    replaced: list[str] = []
    if len(rows):
        start, stop = subject.span(batch)
        x, target = (part[torch.from_numpy(rows).to(subject.device)] for part in subject.batch(start, stop))
        attacks = _Attacks(subject, norm, grid, x, target, known[rows], width, kept, rows)
        for name, found in attacks.run().items():
            by_attack[name][rows] = found
        by[rows], errors[rows] = attacks.by, attacks.errors
        replaced = attacks.replaced
    return {
        "distance": np.minimum(known, np.min(list(by_attack.values()), axis=0)),
        "by": by,
        "errors": errors,
        **by_attack,
        "replaced": np.array(replaced, dtype=np.str_),
        "rejected": 0,
        **subject.spent,
        **kept.arrays(),
    }


class _Attacks:
    def __init__(
        self, subject: Subject, norm: Norm, grid: Sequence[float], x: torch.Tensor, target: torch.Tensor,
        known: NDArray, width: float, kept: Kept, rows: NDArray,
    ) -> None:  # fmt: skip
        self._norm: Norm = norm
        self._subject, self._grid, self._width = subject, grid, width
        self._x, self._target, self._kept, self._rows = x, target, kept, rows
        self.best, self.by = known.copy(), np.full(len(known), "", NAME)
        self.errors = np.zeros(len(known), np.int64)
        self.found: dict[str, NDArray] = {}
        self.replaced: list[str] = []

    def run(self) -> dict[str, NDArray]:
        """Return the distances by attack."""
        self._replaced_backward()
        self._solve("differences", self._differences())
        self._solve("transfer", [self._twin()])
        if self._norm != "l0":
            self._decisions()
        self._random_search()
        return self.found

    def _keep(self, name: str, rows: NDArray, found: CheckedResult) -> None:
        mine = self.found.setdefault(name, np.full(len(self._x), np.inf))
        mine[rows] = np.minimum(mine[rows], found.distance)
        nearer = found.distance < self.best[rows]
        self.best[rows[nearer]], self.by[rows[nearer]] = found.distance[nearer], found.by[nearer]
        self.errors[rows[nearer]] = found.errors[nearer]
        self._kept.take(self._rows[rows], found, nearer)
        if self._subject.cut:
            raise SolveEnded("the time limit has come")

    def _solve(self, name: str, throughs: list[Any]) -> None:
        """Search the nearest errors of all samples; then try each radius on those that stand, of those alone whose
        nearest error is not far from it.
        """
        every = np.arange(len(self._x))
        for number, through in enumerate(throughs):
            found = run_solver(
                self._subject, self._x, self._target, norm=self._norm, purpose=("stronger", name, number),
                by=name, steps=30, restarts=3, through=through,
            )  # fmt: skip
            self._keep(name, every, found)
        for level, epsilon in enumerate(self._grid):
            for number, through in enumerate(throughs):
                rows = np.flatnonzero((self.best > epsilon) & (self.found[name] < 3 * epsilon))
                if not len(rows):
                    continue
                at = torch.from_numpy(rows).to(self._x.device)
                found = run_solver(
                    self._subject, self._x[at], self._target[at], norm=self._norm, epsilon=epsilon,
                    purpose=("stronger", name, number, level), by=name, steps=20, restarts=2, through=through,
                )  # fmt: skip
                self._keep(name, rows, found)

    def _replaced_backward(self) -> None:
        through = BPDA(self._subject.model)
        self.replaced = through.replaces(self._x[:4])
        if self.replaced:
            self._solve("BPDA", [through])

    def _typical(self) -> float:
        """Return the radius in the middle of the reported ones, which says how far to look around a point."""
        return self._grid[len(self._grid) // 2]

    def _differences(self) -> list[Any]:
        size = self._x[0].numel()
        return [
            by_differences(
                self._subject.model,
                step=length_of_steps(self._norm, self._typical(), size, self._width, single=single),
                generator=self._subject.generator("stronger differences", self._norm, single),
                single=single,
                count=64,
            )
            for single in (False, True)
        ]

    def _twin(self) -> Any:
        subject = self._subject
        pool, _ = subject.subset(self._pool())
        single = self._norm in ("l0", "l1")
        length = length_of_steps(self._norm, self._typical(), self._x[0].numel(), self._width, single=single)
        twin = distill(
            subject.model, pool, radius=5 * length, box=subject.box,
            generator=subject.generator("stronger twin", self._norm),
        )  # fmt: skip
        return with_gradient_of(subject.model, twin)

    def _pool(self) -> list[int]:
        count = len(self._subject.samples)
        return np.unique(np.linspace(0, count - 1, min(count, _POOL)).round().astype(int)).tolist()

    def _decisions(self) -> None:
        subject = self._subject
        pool, _ = subject.subset(self._pool())

        def wrong(points: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return misclassified(subject.model(points), self._target[rows])

        nearest = walk_along_boundary(
            wrong, self._x, pool, norm=self._norm, bounds=subject.box.of(self._x), rounds=_ROUNDS[self._norm],
            generator=subject.generator("stronger decisions", self._norm),
        )  # fmt: skip
        found = check_again(subject, self._x, self._target, nearest, norm=self._norm, by="decisions")
        self._keep("decisions", np.arange(len(self._x)), found)

    def _random_search(self) -> None:
        for epsilon in self._grid:
            rows = np.flatnonzero(self.best > epsilon)
            if not len(rows):
                break
            at = torch.from_numpy(rows).to(self._x.device)
            x, target = self._x[at], self._target[at]
            radius = torch.full((len(rows),), float(epsilon), dtype=torch.float64, device=x.device)
            points = random_search(self._subject, x, target, norm=self._norm, epsilon=radius, queries=_QUERIES)
            found = check_again(self._subject, x, target, points, norm=self._norm, by="random search", epsilon=epsilon)
            self._keep("random search", rows, found)
