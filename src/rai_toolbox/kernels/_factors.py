"""The factor by which a datum is multiplied, as a function of its norm: data, so that any kernel can evaluate it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class NormFactor:
    """A factor f(n) of the norm n of a datum, and the order of that norm.

    "normalize": f(n) = scale / max(n, bound). "ball": f(n) = scale · min(1, bound / n), and exactly `scale` for a norm
    that is outside the ball by rounding alone (see `slack`).

    Raises ValueError: `kind` is another.
    """

    kind: Literal["normalize", "ball"]
    p: float  # the order of the norm
    bound: float | Tensor  # the least divisor of "normalize", the radius of "ball"; ≥ 0
    scale: float | Tensor = 1.0  # a factor of the result

    def __post_init__(self) -> None:
        if self.kind != "normalize" and self.kind != "ball":
            raise ValueError(
                f'`kind` of a NormFactor must be "normalize" or "ball", got {self.kind!r}: '
                f"write another change of a datum as a PerDatum transform"
            )

    @property
    def unchanged_to(self) -> float:
        """Data with norms up to this stay as they are."""
        if self.kind == "ball" and not isinstance(self.bound, Tensor) and self.scale == 1:
            return self.bound
        return -1.0

    @property
    def is_of_numbers(self) -> bool:
        """Whether there is no tensor among the settings."""
        return not isinstance(self.bound, Tensor) and not isinstance(self.scale, Tensor)

    def of_numbers(self, norms: Sequence[float], dtype: torch.dtype, numel: int) -> list[float]:
        """Return the factors of a few norms > 0, which `of_` gives too, to the last bit; no setting is a tensor."""
        bound, scale = float(self.bound), float(self.scale)
        if self.kind == "ball":
            relative, absolute = slack(dtype, numel, self.p)
            inside = bound * (1 + relative) + absolute
            factors = [1.0 if n <= inside else 1.0 / n * bound for n in norms]
        else:
            least = float(self._least_divisor(dtype))
            factors = [1.0 / max(n, least) for n in norms]
        return factors if scale == 1 else [f * scale for f in factors]

    def of_(self, norms: Tensor, dtype: torch.dtype, numel: Tensor | int) -> Tensor:
        """Return the factors of norms, which are overwritten; waits for no device.

        norms, shape (n,), float64
        dtype: the dtype of the data.
        numel: how many entries each datum has.
        """
        if self.kind == "ball":
            relative, absolute = slack(dtype, numel, self.p)
            inside = norms <= self.bound * (1 + relative) + absolute
            factors = norms.reciprocal_().mul_(self.bound).masked_fill_(inside, 1.0)
        else:
            factors = norms.clamp_min_(self._least_divisor(dtype)).reciprocal_()
        return factors.mul_(self.scale) if isinstance(self.scale, Tensor) or self.scale != 1 else factors

    def _least_divisor(self, dtype: torch.dtype) -> float | Tensor:
        # A zero datum needs a finite factor, also as a float32. The norm of any other is above the floor.
        floor = 1e-8 if dtype == torch.float16 else 1e-308
        return self.bound.clamp_min(floor) if isinstance(self.bound, Tensor) else max(self.bound, floor)


def slack(dtype: torch.dtype, numel: int | Tensor, p: float) -> tuple[float, float | Tensor]:
    """How far outside a norm may be for a point that is inside but for rounding: relative and absolute.

    Without it the image of a point, rounded, could be outside by a rounding, and move when it is projected again. A
    half is rounded once, from an image computed in a wider dtype: each entry is off by half an eps at most, and the
    64th is for the wider arithmetic. In float32 and float64 the sums, the quotient and the product are rounded too.
    """
    info = torch.finfo(dtype)
    relative = (0.5 + 2**-6) * info.eps if info.bits == 16 else 4 * info.eps
    return relative, 0.5 * numel ** (1 / p) * info.smallest_normal * info.eps
