"""For each row, the nearest point found that changes the decision, and ways to bring it nearer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.kernels._points import distances, is_time_to_look, put_rows_
from rai_toolbox.perturbations._problem import Problem


class NearestFound:
    """Per row, the nearest of all evaluated points at which the decision has changed."""

    KEPT: ClassVar[tuple[str, ...]] = ("x", "distance")

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.x = problem.data.clone()
        self.distance = torch.full((len(self.x),), torch.inf, dtype=torch.float64, device=self.x.device)

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> Tensor:
        """Take note of points; return their distances."""
        distance = distances(x, self._problem.data_of(rows), self._problem.norm)
        nearer = achieved & (distance < self.distance[rows])
        put_rows_((self.x, self.distance), rows, nearer, (x, distance))
        return distance

    def found(self, rows: Tensor) -> Tensor:
        """Return those of `rows` for which a point was found."""
        return rows[self.distance[rows].isfinite()]

    def scatter(self, rows: Tensor, times: int, stream: int) -> None:
        """Try random points of the box for rows without a point: the gradient led to none."""
        problem = self._problem
        rows = rows[self.distance[rows].isinf()]
        if not len(rows):
            return
        low, high = (bound.double() for bound in problem.search_range(rows))
        box = problem.box(rows)
        for number in range(times):
            there = torch.lerp(low, high, problem.noise.uniform(rows, stream + number))
            x = box.land(there - box.data)
            self.update(rows, x, *problem.query.evaluate(x, problem.target_of(rows), beyond_rounding=True))

    def bisect(self, rows: Tensor, times: int) -> None:
        """Move each point along the segment towards the data, as far as the decision stays changed."""
        rows = self.found(rows)
        if not len(rows):
            return
        problem = self._problem
        base = problem.data[rows].double()
        delta = self.x[rows].double() - base
        low = delta.new_zeros(len(rows), 1)
        high = delta.new_ones(len(rows), 1)
        # Small steps are likely: a search from the middle would waste its first evaluations.
        share = delta.new_full((len(rows), 1), 0.99)
        for _ in range(times):
            x = (base + share * delta).to(problem.data.dtype)
            score, achieved = problem.query.evaluate(x, problem.target_of(rows), beyond_rounding=True)
            self.update(rows, x, score, achieved)
            high = torch.where(achieved[:, None], share, high)
            low = torch.where(achieved[:, None], low, share)
            share = (low + high) / 2

    def prune(self, rows: Tensor, points: Tensor, times: int) -> None:
        """Reset changed entries of points, (N, D), the least changed first; several at once while the decision stays.

        A point where nothing is changed stays as it is.
        """
        if not len(rows):
            return
        problem = self._problem
        base, x = problem.data[rows], points[rows]
        changed = x != base
        size = torch.where(changed, (x.double() - base.double()).abs(), torch.inf)
        # rank[i, j]: how many entries of row i are reset before its entry j.
        order = size.argsort(dim=1, stable=True)
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
        count = changed.sum(dim=1, keepdim=True)
        position = torch.zeros_like(count)
        stride = (count // 4).clamp_min(1)
        for step in range(times):
            going = position < count
            if is_time_to_look(step, going) and not bool(going.any()):
                return
            chosen = (rank >= position) & (rank < position + stride) & changed
            trial = torch.where(chosen, base, x)
            score, achieved = problem.query.evaluate(trial, problem.target_of(rows), beyond_rounding=True)
            self.update(rows, trial, score, achieved)
            achieved = achieved[:, None] & going
            x = torch.where(achieved, trial, x)
            single = stride == 1
            position = position + torch.where(achieved | single, stride, 0)
            stride = torch.where(achieved, stride * 2, (stride // 2).clamp_min(1))
