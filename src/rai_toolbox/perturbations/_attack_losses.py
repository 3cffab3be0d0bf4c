"""The loss that each run of a solver maximizes, and its start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rai_toolbox.perturbations import losses as L
from rai_toolbox.perturbations._problem import Problem
from rai_toolbox.perturbations._query import Answer, Loss

MOST_CLASSES = 9
# Of more classes than a search has runs for, so many are looked at for the nearest.
_CANDIDATES = 18

_DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf, "l0": math.inf}

LossOfRows = Callable[[Tensor], Loss]
"""From row numbers of a problem to the loss of these rows."""


@dataclass(frozen=True)
class ClassLosses:
    """One loss per other class: by how much its logit exceeds the true one.

    The worst case lies behind one particular part of the decision boundary. To go for the nearest class alone misses it
    far more often than any fault of the ascent does, so every class gets a run of its own, likely ones first. Where
    there are no classes to choose among (two of them, a target, a user's own loss) there is one loss, the objective's.
    """

    problem: Problem
    ranked: Tensor | None

    @staticmethod
    def after(problem: Problem, output: Tensor) -> ClassLosses:
        """`output`: the model's output at the unperturbed data."""
        objective = problem.objective
        if not objective.default or objective.sign < 0:
            return ClassLosses(problem, None)
        logits = L.as_logits(output, problem.target).nan_to_num(nan=-torch.inf)
        if logits.shape[1] < 3:
            return ClassLosses(problem, None)
        others = logits.scatter(1, problem.target[:, None], -torch.inf)
        return ClassLosses(problem, others.argsort(dim=1, descending=True, stable=True)[:, :-1])

    def candidates(self) -> int:
        """How many of the likeliest classes are candidates: their distances are estimated."""
        return 1 if self.ranked is None else min(self.ranked.shape[1], _CANDIDATES)

    def nearest_first(self, rows: Tensor, norm: str) -> ClassLosses:
        """The candidates in the order of their distances in a linear model, which takes a question for each.

        That is the margin over the dual norm of the gradients' difference.
        """
        if self.ranked is None:
            return self
        problem, count = self.problem, self.candidates()
        distance = self.ranked.new_full((len(problem.data), count), torch.inf, dtype=torch.float64)
        for number in range(count):
            loss = self.of(rows, torch.full_like(rows, number))
            answer = problem.query.ask(problem.data[rows], problem.target_of(rows), loss(rows))
            distance[rows, number] = torch.where(answer.dead, torch.inf, linearized_distance(answer, norm))
        order = distance.argsort(dim=1, stable=True)
        return ClassLosses(problem, self.ranked.gather(1, order))

    def gathered(self, problem: Problem, rows: Tensor) -> ClassLosses:
        """The losses of a problem that was made of these rows."""
        return ClassLosses(problem, None if self.ranked is None else self.ranked[rows])

    @property
    def count(self) -> int:
        return 1 if self.ranked is None else min(self.ranked.shape[1], MOST_CLASSES)

    def any_class(self, rows: Tensor) -> Loss:
        """The objective's own loss."""
        return self.problem.objective.score

    def all_classes(self, rows: Tensor) -> Loss:
        """A loss for any wrong class, where there are fewer runs than classes."""
        return self.any_class(rows) if self.ranked is None else L.rescaled_cross_entropy

    def __getitem__(self, number: int) -> LossOfRows:
        ranked = self.ranked
        if ranked is None:
            return self.any_class

        def of_rows(rows: Tensor) -> Loss:
            classes = ranked[rows, number % self.count]
            return logit_difference(classes, self.problem.target_of(rows))

        return of_rows

    def of(self, rows: Tensor, numbers: Tensor) -> LossOfRows:
        """As `self[number]`, for some rows, with a number for each."""
        if self.ranked is None:
            return self.any_class
        classes = torch.zeros_like(self.problem.target)
        classes[rows] = self.ranked[rows, numbers]
        return lambda some: logit_difference(classes[some], self.problem.target_of(some))


def logit_difference(classes: Tensor, targets: Tensor) -> Loss:
    """From an output to the logit of `classes` less that of `targets`, which are the targets that it is asked for."""
    both = torch.stack((classes, targets), dim=1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        mine, true = L.as_logits(output, target).gather(1, both).unbind(dim=1)
        return mine - true

    return loss


def linearized_distance(answer: Answer, norm: str) -> Tensor:
    """The distance of the boundary if the loss were linear: |loss| over the dual norm of its gradient."""
    slope = torch.linalg.vector_norm(answer.grad, ord=_DUAL[norm], dim=1, dtype=torch.float64)
    return answer.loss.abs() / slope.clamp_min_(1e-300)
