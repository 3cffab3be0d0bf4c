"""For each row, the nearest point found that changes the decision, and ways to bring it nearer."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rai_toolbox.kernels._points import by_blocks, distances, is_time_to_look, put_rows_
from rai_toolbox.perturbations._ball import Ball
from rai_toolbox.perturbations._problem import Problem


class Nearest(Protocol):
    """What is given every point that a walk evaluates."""

    @property
    def distance(self) -> Tensor: ...

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> Tensor: ...


class NearestFound:
    """Per row, the nearest of all evaluated points at which the decision has changed."""

    KEPT: ClassVar[tuple[str, ...]] = ("x", "distance")
    scored_within: Tensor | None = None
    """Up to which distance points count also where the decision has not changed, (N,)."""

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
        low, high = problem.search_range(rows)
        box = problem.box(rows)

        def anywhere(number: int, box: Ball, part: slice) -> Tensor:
            share = problem.noise.uniform(rows[part], stream + number)
            return torch.lerp(low[part].double(), high[part].double(), share) - box.data

        for number in range(times):
            x = box.by_blocks(partial(anywhere, number))
            self.update(rows, x, *problem.look(rows, x))

    def bisect(self, rows: Tensor, times: int) -> None:
        """Move each point along the segment towards the data, as far as the decision stays changed."""
        rows = self.found(rows)
        if not len(rows):
            return
        problem = self._problem
        base, end = problem.data_of(rows), self.x[rows]
        low = self.distance.new_zeros(len(rows), 1)
        high = self.distance.new_ones(len(rows), 1)
        # Small steps are likely: a search from the middle would waste its first evaluations.
        share = self.distance.new_full((len(rows), 1), 0.99)

        def between(part: slice) -> Tensor:
            here = base[part].double()
            return (here + share[part] * (end[part].double() - here)).to(base.dtype)

        for _ in range(times):
            x = by_blocks(between, base)
            score, achieved = problem.look(rows, x)
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
        base, x = problem.data_of(rows), points[rows]
        changed = x != base

        def ranked(part: slice) -> Tensor:
            size = (x[part].double() - base[part].double()).abs().masked_fill_(~changed[part], torch.inf)
            order = size.argsort(dim=1, stable=True)
            numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
            return torch.empty_like(order).scatter_(1, order, numbers).to(torch.int32)

        # rank[i, j]: how many entries of row i are reset before its entry j.
        rank = by_blocks(ranked, x)
        count = changed.sum(dim=1, keepdim=True)
        position = torch.zeros_like(count)
        stride = (count // 4).clamp_min(1)
        for step in range(times):
            going = position < count
            if is_time_to_look(step, going) and not bool(going.any()):
                return
            chosen = (rank >= position) & (rank < position + stride) & changed
            trial = torch.where(chosen, base, x)
            score, achieved = problem.look(rows, trial)
            self.update(rows, trial, score, achieved)
            achieved = achieved[:, None] & going
            x = torch.where(achieved, trial, x)
            single = stride == 1
            position = position + torch.where(achieved | single, stride, 0)
            stride = torch.where(achieved, stride * 2, (stride // 2).clamp_min(1))
