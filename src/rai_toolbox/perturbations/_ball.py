"""The set of allowed perturbations of each row of a matrix: a ball of a norm, and a box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._projections import project_l1_ball_, project_l2_ball_
from rai_toolbox.kernels._points import by_blocks, is_one_block, land, scaled_into_ball, shrunk_into_ball, unit_l2

NORMS = ("l1", "l2", "linf", "l0")

# As users name a norm: those, in capitals too, or by their order.
Norm: TypeAlias = Literal["l1", "l2", "linf", "l0", "L1", "L2", "Linf", "L0", "inf"] | float


def check_norm(norm: object) -> str:
    """Return the name of a norm, one of `NORMS`, from any spelling that users may give."""
    if isinstance(norm, str):
        name = norm.lower()
        name = name if name.startswith("l") else f"l{name}"
    elif isinstance(norm, int | float) and not isinstance(norm, bool):
        name = f"l{norm:g}"
    else:
        name = ""
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, or an order: 1, 2, inf, 0; got {norm!r}")
    return name


@dataclass(frozen=True)
class Ball:
    """Points around the rows of `data`, in the data's own dtype.

    `lower` and `upper` are matrices that broadcast to `data`, or None; `epsilon` is (N, 1), float64.
    """

    norm: str
    data: Tensor
    epsilon: Tensor
    lower: Tensor | None
    upper: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: half precision is for storing points only."""
        return torch.float32 if self.data.element_size() == 2 else self.data.dtype

    def __getitem__(self, rows: Tensor | slice) -> Ball:
        return replace(
            self,
            data=some_of(self.data, rows),
            epsilon=self.epsilon[rows],
            lower=rows_of(self.lower, rows, len(self.data)),
            upper=rows_of(self.upper, rows, len(self.data)),
        )

    def with_epsilon(self, epsilon: Tensor) -> Ball:
        ball = Ball(self.norm, self.data, epsilon, self.lower, self.upper)
        if is_one_block(self.data):
            ball.__dict__["_box"] = self._box  # computed once
        return ball

    def by_blocks(self, moved: Callable[[Ball, slice], Tensor]) -> Tensor:
        """The stored points for what `moved`, asked about a ball of some rows and these rows, returns: projected."""
        if is_one_block(self.data):
            return self.land(moved(self, slice(None)))

        def work(part: slice) -> Tensor:
            ball = self[part]
            return ball.land(moved(ball, part))

        return by_blocks(work, self.data)

    @cached_property
    def _box(self) -> tuple[Tensor | None, Tensor | None]:
        """The bounds of perturbations."""
        data = self.data.to(self.dtype)
        low, high = (None if b is None else b.to(self.dtype) - data for b in (self.lower, self.upper))
        return low, high

    @cached_property
    def _cube(self) -> tuple[Tensor, Tensor]:
        """The bounds of perturbations of an Linf ball; zero lies in both, the ball's and the box's."""
        radius = self.radius
        low, high = self._box
        return (
            -radius if low is None else torch.maximum(low, -radius),
            radius if high is None else torch.minimum(high, radius),
        )

    @cached_property
    def radius(self) -> Tensor:
        return self.epsilon.to(self.dtype)

    def delta(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) - self.data.to(self.dtype)

    def project_(self, delta: Tensor) -> Tensor:
        """The point of ball ∩ box that is nearest to data + delta, as a perturbation; delta may be overwritten."""
        if self.norm == "linf":
            return delta.clamp_(*self._cube)
        return _PROJECTIONS[self.norm](delta, self.radius, *self._box)

    def land(self, delta: Tensor) -> Tensor:
        """The stored point for a projected perturbation; in its own dtype it lies in ball and box."""
        return land(delta, self.data, self.epsilon, self.lower, self.upper, self.norm)

    def nearest(self, x: Tensor) -> Tensor:
        """`land(project_(x - data))`."""
        return self.by_blocks(lambda ball, part: ball.project_(ball.delta(x[part])))

    def steepest(self, grad: Tensor) -> Tensor:
        """The unit perturbation that a linear function with this gradient grows fastest along (L1 and L0: of L2)."""
        if self.norm == "linf":
            return grad.sign()
        return unit_l2(grad)

    def free(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient, zero where an entry has no room in its direction: for steps that few entries take."""
        if self.lower is None or self.upper is None:
            return grad
        return grad.masked_fill(x == torch.where(grad > 0, self.upper, self.lower), 0.0)

    def random(self, noise: Callable[[str, slice], Tensor]) -> Tensor:
        """A random point; `noise` is called with "uniform" or "normal", and some rows."""
        return self.by_blocks(lambda ball, part: ball.project_(ball._random(lambda kind: noise(kind, part))))

    def _random(self, noise: Callable[[str], Tensor]) -> Tensor:
        if self.norm == "linf":
            delta = (noise("uniform") * 2 - 1) * self.epsilon
        elif self.norm == "l2":
            delta = unit_l2(noise("normal")) * self.epsilon
        elif self.norm == "l1":
            delta = noise("normal")
            delta = delta / delta.abs().sum(dim=1, keepdim=True).clamp_min(1e-300) * self.epsilon
        else:
            # No radius bounds an entry here: use the size of the data.
            size = self.data.double().abs().amax(dim=1, keepdim=True)
            delta = (noise("uniform") * 2 - 1) * torch.where(size > 0, size, 1.0)
        return delta.to(self.dtype)


def some_of(data: Tensor, rows: Tensor | slice) -> Tensor:
    """The rows of a matrix with these numbers, which increase; not a copy where these are all."""
    return data if isinstance(rows, Tensor) and len(rows) == len(data) else data[rows]


def rows_of(bound: Tensor | None, rows: Tensor | slice, n: int) -> Tensor | None:
    return bound[rows] if bound is not None and bound.shape[0] == n and n != 1 else bound


def _project_l0(delta: Tensor, epsilon: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Keep the entries whose loss would cost most: those with the largest δ² - (δ - clip(δ))²."""
    clipped = delta if low is None and high is None else delta.clamp(low, high)
    gain = clipped * (2 * delta - clipped)
    order = gain.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(delta.shape[1], device=delta.device).expand_as(order)
    )
    return torch.where(rank < epsilon, clipped, 0.0)


def _project_l2(delta: Tensor, epsilon: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    moved = scaled_into_ball(delta, epsilon, low, high)
    return project_l2_ball_(delta, epsilon[:, 0], lower=low, upper=high) if moved is None else moved


def _project_l1(delta: Tensor, epsilon: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    if low is not None and high is not None and (found := shrunk_into_ball(delta, epsilon, low, high)) is not None:
        moved, rest = found
        if len(rest):
            moved[rest] = project_l1_ball_(delta[rest], epsilon[rest, 0], lower=low[rest], upper=high[rest])
        return moved
    return project_l1_ball_(delta, epsilon[:, 0], lower=low, upper=high)


_PROJECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "l1": _project_l1,
    "l2": _project_l2,
    "l0": _project_l0,
}
