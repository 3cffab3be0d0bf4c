"""How one pass changes the entries of a datum, as numbers that an operator of torch can take."""

from __future__ import annotations

import dataclasses
import enum
import math

import torch

from rai_toolbox.kernels._factors import NormFactor, slack


class Kind(enum.IntEnum):
    """A change; the numbers are those of the kernels."""

    NOTHING = 0
    NORMALIZE = 1
    BALL = 2
    SIGN = 3
    CLAMP = 4


@dataclasses.dataclass(frozen=True)
class Change:
    """How an entry changes: by a change, then a scale, then a bias."""

    kind: Kind = Kind.NOTHING
    order: int = 2  # of the norm, 1 or 2; 2 where there is none
    bound: float = 0.0  # the least divisor of NORMALIZE, the radius of BALL
    factor_scale: float = 1.0  # a factor of NORMALIZE or BALL: part of the multiplication
    # low, high: the limits of CLAMP
    low: float = -math.inf
    high: float = math.inf
    # scale, bias: what follows
    scale: float = 1.0
    bias: float = 0.0

    @property
    def by_norm(self) -> bool:
        """Whether the change depends on the norm of the datum."""
        return self.kind in (Kind.NORMALIZE, Kind.BALL)

    @property
    def is_nothing(self) -> bool:
        """Whether entries stay as they are."""
        return self.kind is Kind.NOTHING and self.scale == 1 and self.bias == 0

    def numbers(self) -> list[float]:
        """All but the kind and the order."""
        return [self.bound, self.factor_scale, self.low, self.high, self.scale, self.bias]

    @staticmethod
    def of(kind: int, order: int, numbers: list[float]) -> Change:
        """The change that gave these numbers."""
        return Change(Kind(kind), order, *numbers)


NOTHING = Change()


def by_factor(factor: NormFactor, scale: float = 1.0, bias: float = 0.0) -> Change | None:
    """The change that multiplies by a factor of the norm, or None if the kernels do not have it."""
    if factor.p not in (1, 2) or not isinstance(factor.bound, (int, float)):
        return None
    if not isinstance(factor.scale, (int, float)):
        return None
    kind = Kind.NORMALIZE if factor.kind == "normalize" else Kind.BALL
    return Change(kind, int(factor.p), float(factor.bound), float(factor.scale), scale=float(scale), bias=float(bias))


def slack_of(dtype: torch.dtype) -> tuple[float, float]:
    """Return by what share a norm may exceed the radius and count as inside, and the least number > 0 of the dtype.

    The kernels count the absolute slack of `slack` in that least number.
    """
    info = torch.finfo(dtype)
    return float(slack(dtype, 1, 1)[0]), info.smallest_normal * info.eps
