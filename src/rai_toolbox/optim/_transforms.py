"""What a transform is: data that says what it does to a datum, and how far an entry's result reaches.

The reach decides how a transform is applied to many tensors, to a sharded one or to a sparse one; see `_engine.py`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.functional import (
    _scaling,
    lmo_l1_ball_,
    project_l1_ball_,
    project_l2_ball_,
    project_linf_ball_,
    project_simplex_,
    signed_top_q_,
    top_q_,
)
from rai_toolbox.functional._nearest import representable
from rai_toolbox.functional._selection import signed_top_q_of_all_, top_q_of_all_
from rai_toolbox.kernels._factors import NormFactor

# From so many tensors on, the calls cost more than the memory traffic does.
_MANY = 64

Number: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None


@dataclasses.dataclass(frozen=True)
class Entrywise:
    """Every entry's result depends on that entry alone (sign, clamp).

    Attributes
    ----------
    apply_ : callable
        Changes a list of tensors in place.
    keeps_zero : bool
        Zero gives zero, so that a sparse tensor may be changed by its values.
    """

    apply_: Callable[[Sequence[Tensor]], Any]
    keeps_zero: bool = True


@dataclasses.dataclass(frozen=True)
class ByNorm:
    """Every datum is multiplied by a factor that is a function of its norm (normalise, L2 ball).

    Attributes
    ----------
    factor : NormFactor
        The function, and the order of the norm.
    """

    factor: NormFactor

    @property
    def p(self) -> float:
        """The order of the norm."""
        return self.factor.p

    @property
    def has_limit(self) -> bool:
        """Whether a datum with infinite entries goes where a large one in that direction goes (else it becomes NaN)."""
        return self.factor.kind == "ball"

    @staticmethod
    def takes(scale: float) -> bool:
        """Whether `scaled(scale)` keeps its factors within the range of float32, whatever ordinary norms there are."""
        return 0.02 <= abs(scale) <= 1e6

    def scaled(self, scale: float) -> ByNorm:
        """The same, followed by a multiplication: one pass over memory instead of two."""
        return ByNorm(dataclasses.replace(self.factor, scale=self.factor.scale * scale))


@dataclasses.dataclass(frozen=True)
class PerDatum:
    """An entry's result depends on its whole datum in some other way (top-q, L1 ball, oracles).

    Attributes
    ----------
    apply_ : callable
        `apply_(x, k)` changes one tensor in place, whose last k dimensions are a datum.
    alike : bool
        The same change for every tensor, so that tensors of one shape may be stacked. False for a transform that
        draws a number for each tensor, or that carries an option per datum.
    of_all_ : callable, optional
        `of_all_(xs, ks)` changes a list of tensors, faster than one by one.
    drawn : callable, optional
        Draws the number for one tensor, and returns the transform with that number.
    within : callable, optional
        `within(rows, entries)`: the same transform for a part of the tensor that it was made for. Both are functions
        of an option, which cut one that is a tensor: `rows` one that has an entry per datum, `entries` one that
        broadcasts to the tensor.
    """

    apply_: Callable[[Tensor, int], Any]
    alike: bool = True
    of_all_: Callable[[Sequence[Tensor], Sequence[int]], Any] | None = None
    drawn: Callable[[], PerDatum] | None = None
    within: Callable[[Callable[[Any], Any], Callable[[Any], Any]], PerDatum] | None = None


Transform: TypeAlias = Entrywise | ByNorm | PerDatum


def normalization(p: float, eps: float) -> ByNorm:
    """x / max(‖x‖p, eps)."""
    return ByNorm(NormFactor("normalize", p, eps))


def signs() -> Entrywise:
    """sign(x); x / |x| where x is complex."""

    def apply_(xs: Sequence[Tensor]) -> None:
        if any(map(torch.is_complex, xs)):
            for x in xs:
                x.sgn_()
        else:
            torch._foreach_sign_(xs)  # pyright: ignore

    return Entrywise(apply_)


def clamping(clamp_min: float | None, clamp_max: float | None) -> Entrywise:
    """x moved into [clamp_min, clamp_max]."""

    def apply_(xs: Sequence[Tensor]) -> None:
        if len(xs) < _MANY or len(set(map(operator.attrgetter("dtype"), xs))) > 1:
            for x in xs:
                x.clamp_(representable(clamp_min, x.dtype), representable(clamp_max, x.dtype))
            return
        # two calls for all of them cost less than one for each, but read large ones twice
        low, high = representable(clamp_min, xs[0].dtype), representable(clamp_max, xs[0].dtype)
        if low is not None:
            torch._foreach_clamp_min_(xs, low)  # pyright: ignore
        if high is not None:
            torch._foreach_clamp_max_(xs, high)  # pyright: ignore

    keeps_zero = (clamp_min is None or clamp_min <= 0) and (clamp_max is None or clamp_max >= 0)
    return Entrywise(apply_, keeps_zero)


def selection(q: Callable[[], float], *, alike: bool) -> PerDatum:
    """Keep the 1 - q share of entries of largest magnitude; `q` is asked anew for each tensor."""
    return _with_share(lambda x, k, share: top_q_(x, share, param_ndim=k), top_q_of_all_, q, alike)


def signed_selection(q: Callable[[], float], *, alike: bool, eps: float = 0.0) -> PerDatum:
    """`selection`, then the sign, then division by the L1 norm, at least `eps`."""

    def select_(x: Tensor, k: int, share: float) -> None:
        if eps <= 1:  # the norm is a whole number
            signed_top_q_(x, share, param_ndim=k)
        else:
            _scaling.normalize_(top_q_(x, share, param_ndim=k).sign_(), 1, param_ndim=k, eps=eps)

    return _with_share(select_, signed_top_q_of_all_ if eps <= 1 else None, q, alike)


def _with_share(
    select_: Callable[[Tensor, int, float], Any],
    of_all_: Callable[[Sequence[Tensor], Sequence[int], float], Any] | None,
    q: Callable[[], float],
    alike: bool,
) -> PerDatum:
    def drawn() -> PerDatum:
        share = q()
        return PerDatum(lambda x, k: select_(x, k, share))

    if not alike:
        return PerDatum(lambda x, k: select_(x, k, q()), alike, drawn=drawn)
    together_ = None if of_all_ is None else lambda xs, ks: of_all_(xs, ks, q())
    return PerDatum(lambda x, k: select_(x, k, q()), of_all_=together_)


def negated_l1_vertex() -> PerDatum:
    """The negative of the oracle of the L1 ball of radius 1."""
    return PerDatum(lambda g, k: lmo_l1_ball_(g, 1.0, param_ndim=k, negated=True))


def l2_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> ByNorm | PerDatum:
    """The nearest point of the L2 ball, or of the ball and a box."""
    if isinstance(epsilon, Tensor) or lower is not None or upper is not None:
        return _projection(project_l2_ball_, epsilon, lower, upper)
    return ByNorm(NormFactor("ball", 2, epsilon))


def l1_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> PerDatum:
    """The nearest point of the L1 ball, or of the ball and a box."""
    return _projection(project_l1_ball_, epsilon, lower, upper)


def linf_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> Entrywise | PerDatum:
    """The nearest point of the Linf ball, or of the ball and a box."""
    if isinstance(epsilon, Tensor) or lower is not None or upper is not None:
        return _projection(project_linf_ball_, epsilon, lower, upper)
    return clamping(-epsilon, epsilon)


def _projection(project_: Callable[..., Any], epsilon: Number, lower: Bound, upper: Bound) -> PerDatum:
    alike = not isinstance(epsilon, Tensor) and lower is None and upper is None
    return PerDatum(
        lambda x, k: project_(x, epsilon, param_ndim=k, lower=lower, upper=upper),
        alike,
        within=lambda rows, entries: _projection(project_, rows(epsilon), entries(lower), entries(upper)),
    )


def simplex_projection(total: Number) -> PerDatum:
    """The nearest point with entries ≥ 0 that sum to `total`."""
    return PerDatum(
        lambda x, k: project_simplex_(x, total, param_ndim=k),
        not isinstance(total, Tensor),
        within=lambda rows, entries: simplex_projection(rows(total)),
    )
