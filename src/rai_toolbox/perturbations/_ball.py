"""The set of allowed perturbations of each row of a matrix: a ball of a norm, and a box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional._projections import project_l1_ball, project_l2_ball

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


def distances(perturbed: Tensor, data: Tensor, norm: str) -> Tensor:
    """The norm of each row of `perturbed - data`, in float64, where the difference of stored values is exact."""
    # an infinite entry that stays is at distance zero
    delta = torch.where(perturbed == data, 0.0, perturbed.double() - data.double())
    if not delta.shape[1]:
        return delta.new_zeros(len(delta))
    if norm == "l1":
        return delta.abs().sum(dim=1)
    if norm == "l2":
        return torch.linalg.vector_norm(delta, dim=1)
    if norm == "linf":
        return delta.abs().amax(dim=1)
    return (delta != 0).sum(dim=1).double()


def toward(x: Tensor, wish: Tensor, data: Tensor) -> Tensor:
    """Round `wish` (float64) to the dtype of `data`, never further from `data` than it is. `x` is `wish` rounded."""
    beyond = (x.double() - data.double()).abs() > (wish - data.double()).abs()
    return torch.where(beyond, torch.nextafter(x, data), x)


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

    def __getitem__(self, rows: Tensor) -> Ball:
        return replace(
            self,
            data=self.data[rows],
            epsilon=self.epsilon[rows],
            lower=rows_of(self.lower, rows, len(self.data)),
            upper=rows_of(self.upper, rows, len(self.data)),
        )

    def with_epsilon(self, epsilon: Tensor) -> Ball:
        return replace(self, epsilon=epsilon)

    def delta(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) - self.data.to(self.dtype)

    def project(self, delta: Tensor) -> Tensor:
        """The point of ball ∩ box that is nearest to data + delta, as a perturbation."""
        data = self.data.to(self.dtype)
        low = None if self.lower is None else self.lower.to(self.dtype) - data
        high = None if self.upper is None else self.upper.to(self.dtype) - data
        return _PROJECTIONS[self.norm](delta, self.epsilon.to(self.dtype), low, high)

    def land(self, delta: Tensor) -> Tensor:
        """The stored point for a projected perturbation; in its own dtype it lies in ball and box."""
        base = self.data.double()
        delta = delta.double()
        if self.norm == "linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        elif self.norm != "l0":
            order = 1 if self.norm == "l1" else 2
            size = torch.linalg.vector_norm(delta, ord=order, dim=1, keepdim=True)
            delta = delta * torch.where(size > self.epsilon, self.epsilon / size * (1 - 1e-15), 1.0)
        wish = base + delta
        x = toward(wish.to(self.data.dtype), wish, self.data)
        if self.norm == "linf" and self.data.dtype == torch.float64:
            # The sum above was itself rounded.
            x = torch.where((x - base).abs() > self.epsilon, torch.nextafter(x, base), x)
        if self.lower is not None:
            x = torch.maximum(x, self.lower)
        if self.upper is not None:
            x = torch.minimum(x, self.upper)
        return x

    def nearest(self, x: Tensor) -> Tensor:
        """`land(project(x - data))`."""
        return self.land(self.project(self.delta(x)))

    def steepest(self, grad: Tensor) -> Tensor:
        """The unit perturbation that a linear function with this gradient grows fastest along (L1 and L0: of L2)."""
        if self.norm == "linf":
            return grad.sign()
        return unit_l2(grad)

    def random(self, noise: Callable[[str], Tensor]) -> Tensor:
        """A random point; `noise` is called with "uniform" or "normal"."""
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
        return self.land(self.project(delta.to(self.dtype)))


def unit_l2(x: Tensor) -> Tensor:
    """x / ‖x‖₂ of each row, zero for zero, over the whole range of the dtype."""
    x = x / x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def rows_of(bound: Tensor | None, rows: Tensor, n: int) -> Tensor | None:
    return bound[rows] if bound is not None and bound.shape[0] == n and n != 1 else bound


def _project_linf(delta: Tensor, epsilon: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    delta = delta.clamp(-epsilon, epsilon)
    return delta if low is None and high is None else delta.clamp(low, high)


def _project_l0(delta: Tensor, epsilon: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """Keep the entries whose loss would cost most: those with the largest δ² - (δ - clip(δ))²."""
    clipped = delta if low is None and high is None else delta.clamp(low, high)
    gain = clipped * (2 * delta - clipped)
    order = gain.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(delta.shape[1], device=delta.device).expand_as(order)
    )
    return torch.where(rank < epsilon, clipped, 0.0)


_PROJECTIONS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "l1": lambda delta, epsilon, low, high: project_l1_ball(delta, epsilon[:, 0], lower=low, upper=high),
    "l2": lambda delta, epsilon, low, high: project_l2_ball(delta, epsilon[:, 0], lower=low, upper=high),
    "linf": _project_linf,
    "l0": _project_l0,
}
