"""Copies of the rows of a problem: for runs that are made side by side, in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import seen
from rai_toolbox.kernels._points import distances
from rai_toolbox.perturbations._attack_losses import ClassLosses
from rai_toolbox.perturbations._ball import some_of
from rai_toolbox.perturbations._nearest_found import Nearest, NearestFound
from rai_toolbox.perturbations._problem import Best, Found, Problem


class Copies:
    """Copies of n rows of a problem as a problem of its own, in which copy c of the i-th row is row c * n + i.

    Each copy draws random numbers of its own. What is found for it is passed on to the row. A single copy of each row
    is that row itself, in the problem that there was.

    problem: of the copies.
    rows, shape (count * n,): of that problem.
    """

    def __init__(self, problem: Problem, rows: Tensor, count: int) -> None:
        self._originals, self._count = rows, count
        self._origin = rows.repeat(count)
        self.problem = problem if count == 1 else problem.gathered(self._origin, problem.noise.of_copies(rows, count))
        self.rows = rows if count == 1 else torch.arange(len(self._origin), device=rows.device)

    def some(self, numbers: Tensor) -> Tensor:
        """Of each row, so many copies, (n,)."""
        if self._count == 1:
            return self.rows
        copy = torch.arange(self._count, device=self.rows.device)[:, None]
        return self.rows[(copy < numbers).flatten()]

    def originals(self, rows: Tensor) -> Tensor:
        """Of which rows these are copies."""
        return rows if self._count == 1 else self._origin[rows]

    def gathered(self, values: Tensor) -> Tensor:
        """For all rows of this problem, what there is for all rows of the original one."""
        return values if self._count == 1 else values[self._origin]

    def asks(self, question: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        """A question about rows of the original problem as one about the copies."""
        return None if question is None else lambda rows: question(self.originals(rows))

    def of(self, values: Sequence[Tensor], rows: Tensor) -> Tensor:
        """For rows of this problem, from what each copy has for the n rows, tensors of shape (n, ...)."""
        return values[0] if self._count == 1 else some_of(torch.cat(list(values)), rows)

    def each(self, value: Tensor, rows: Tensor, fill: float) -> Tensor:
        """The other way round, shape (count, n), from the values of some rows of this problem."""
        if self._count == 1:
            return value[None]
        return (
            torch.full((len(self.rows),), fill, dtype=value.dtype, device=value.device)
            .index_copy_(0, rows, value)
            .view(self._count, -1)
        )

    def losses(self, losses: ClassLosses) -> ClassLosses:
        return losses if self._count == 1 else losses.gathered(self.problem, self._origin)

    def nearest(self, nearest: NearestFound) -> Nearest:
        return nearest if self._count == 1 else _NearestOfCopies(self, nearest)

    def best(self, best: Best) -> Found:
        return best if self._count == 1 else _BestOfCopies(self, best)

    def pass_on(self, to: _Finds, rows: Tensor, worth: Tensor, points: tuple[Tensor, Tensor, Tensor]) -> None:
        """Of the copies of a row, pass on the point that is worth most, if it is worth more than -inf.

        rows, worth, shape (m,): of the copies that were asked about; points: (x, score, achieved) of these.
        """
        nothing = -torch.inf
        if seen(lambda: not bool((worth > nothing).any()), worth):
            return
        most, copy = self.each(worth.double(), rows, nothing).max(dim=0)
        place = torch.zeros_like(self.rows)
        place[rows] = torch.arange(len(rows), device=rows.device)
        chosen = place.view(self._count, -1).gather(0, copy[None])[0]
        x, score, achieved = (value[chosen] for value in points)
        worthless = most == nothing
        to.update(self._originals, x, score.masked_fill(worthless, nothing), achieved & ~worthless)


class _Finds(Protocol):
    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> object: ...


class _NearestOfCopies:
    """The nearest points found of the rows that copies are of."""

    def __init__(self, copies: Copies, nearest: NearestFound) -> None:
        self._copies, self._nearest = copies, nearest

    @property
    def distance(self) -> Tensor:
        return self._nearest.distance[self._copies.originals(self._copies.rows)]

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> Tensor:
        copies, points, problem = self._copies, (x, score, achieved), self._copies.problem
        distance = distances(x, problem.data_of(rows), problem.norm)
        origin, within = copies.originals(rows), self._nearest.scored_within
        if not seen(lambda: not bool(achieved.any()), x):
            nearer = achieved & (distance < self._nearest.distance[origin])
            copies.pass_on(self._nearest, rows, torch.where(nearer, -distance, -torch.inf), points)
        if within is not None:
            inside = (distance <= within[origin]) & ~achieved
            copies.pass_on(self._nearest, rows, torch.where(inside, score, -torch.inf), points)
        return distance


class _BestOfCopies:
    """The best points of the rows that copies are of."""

    def __init__(self, copies: Copies, best: Best) -> None:
        self._copies, self._best = copies, best
        self.dead = torch.zeros_like(copies.rows)

    @property
    def achieved(self) -> Tensor:
        return self._best.achieved[self._copies.originals(self._copies.rows)]

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> None:
        worth = torch.where(achieved, torch.inf, score)
        better = worth > self._best.score[self._copies.originals(rows)]
        self._copies.pass_on(self._best, rows, torch.where(better, worth, -torch.inf), (x, score, achieved))
