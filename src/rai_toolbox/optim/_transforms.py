"""What a transform is: data that says what it does to a datum, and how far an entry's result reaches.

The reach decides how a transform is applied to many tensors, to a sharded one or to a sparse one; see `_separate.py`
and `_sharding.py`. A step is a list of stages: transforms, each with a scale and a bias.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.functional import (
    lmo_l1_ball_,
    normalize_,
    project_l1_ball_,
    project_l2_ball_,
    project_linf_ball_,
    project_simplex_,
    signed_top_q_,
    top_q_,
)
from rai_toolbox.functional._nearest import representable
from rai_toolbox.functional._polytopes import project_simplex_of_all_
from rai_toolbox.functional._projections import project_l1_ball_of_all_
from rai_toolbox.functional._scaling import ScalingPlan, scale_by_norm_
from rai_toolbox.functional._selection import signed_top_q_of_all_, top_q_of_all_
from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.optim._hooks import run_hook
from rai_toolbox.optim._memory import First
from rai_toolbox.optim._options import plain
from rai_toolbox.optim._random import Draws
from rai_toolbox.optim._running import Remembering
from rai_toolbox.optim._torch_private import foreach_clamp_max_, foreach_clamp_min_, foreach_sign_

# From so many tensors on, the calls cost more than the memory traffic does.
_MANY = 64

Number: TypeAlias = float | Tensor
Bound: TypeAlias = float | Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Entrywise:
    """Every entry's result depends on that entry alone.

    Raises ValueError if `kind` is another.
    """

    kind: Literal["sign", "clamp"]  # sign(x), x / |x| where x is complex; or x moved into [low, high]
    # low, high: the bounds of a clamp
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.kind != "sign" and self.kind != "clamp":
            raise ValueError(
                f'`kind` of an Entrywise transform must be "sign" or "clamp", got {self.kind!r}: '
                f"write another change as a PerDatum or a Remembering transform"
            )

    @property
    def keeps_zero(self) -> bool:
        """Whether zero gives zero, so that a sparse tensor may be changed by its values."""
        return (self.low is None or self.low <= 0) and (self.high is None or self.high >= 0)

    def change_(self, xs: Sequence[Tensor], ks: Sequence[int] = (), plan: object = None) -> None:
        """Change dense tensors in place."""
        if self.kind == "clamp":
            self._clamp_(xs)
        elif any(map(torch.is_complex, xs)):
            for x in xs:
                x.sgn_()
        else:
            foreach_sign_(xs)

    def _clamp_(self, xs: Sequence[Tensor]) -> None:
        if len(xs) < _MANY or len(set(map(operator.attrgetter("dtype"), xs))) > 1:
            for x in xs:
                x.clamp_(representable(self.low, x.dtype), representable(self.high, x.dtype))
            return
        # two calls for all of them cost less than one for each, but read large ones twice
        low, high = representable(self.low, xs[0].dtype), representable(self.high, xs[0].dtype)
        if low is not None:
            foreach_clamp_min_(xs, low)
        if high is not None:
            foreach_clamp_max_(xs, high)


@dataclasses.dataclass(frozen=True, eq=False)
class ByNorm:
    """Every datum is multiplied by a factor that is a function of its norm (normalize, L2 ball)."""

    factor: NormFactor  # the function, and the order of the norm

    def change_(self, xs: Sequence[Tensor], ks: Sequence[int], plan: ScalingPlan | None = None) -> ScalingPlan:
        """Change dense tensors in place, a datum being their last k dimensions; return a plan for the next time."""
        if plan is not None:
            plan.run(xs, self.factor)
            return plan
        return scale_by_norm_(xs, ks, self.factor)

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


@dataclasses.dataclass(frozen=True, eq=False)
class PerDatum:
    """An entry's result depends on its whole datum in some other way (top-q, L1 ball, oracles)."""

    # `apply_(x, k)` changes one tensor in place, whose last k dimensions are a datum.
    apply_: Callable[[Tensor, int], Any]
    # The same change for every tensor, so that tensors of one shape may be stacked. False for a transform that draws a
    # number for each tensor, or that carries an option per datum.
    alike: bool = True
    # `of_all_(xs, ks)` changes a list of tensors, faster than one by one.
    of_all_: Callable[[Sequence[Tensor], Sequence[int]], Any] | None = None
    # Draws the number for one tensor, and returns the transform with that number.
    drawn: Callable[[], PerDatum] | None = None
    draws: Draws | None = None  # where `drawn` draws from
    # `within(rows, entries)`: the same transform for a part of the tensor that it was made for. Both are functions of
    # an option, which cut one that is a tensor: `rows` one that has an entry per datum, `entries` one that broadcasts
    # to the tensor.
    within: Callable[[Callable[[Any], Any], Callable[[Any], Any]], PerDatum] | None = None
    # `cost(shape)`: the work that a datum of this shape takes, for comparison with others; the number of its entries.
    # Ranks share cut data out by it.
    cost: Callable[[Sequence[int]], int] = math.prod

    def change_(self, xs: Sequence[Tensor], ks: Sequence[int], plan: object = None) -> None:
        """Change dense tensors in place; the last k dimensions of each are one datum."""
        if self.of_all_ is not None and len(xs) > 1:
            self.of_all_(xs, ks)
        else:
            for x, k in zip(xs, ks, strict=True):
                self.apply_(x, k)


@dataclasses.dataclass(frozen=True, eq=False)
class Hook:
    """A hook that a user overrides: nobody else knows what it does, so it takes one parameter at a time."""

    owner: weakref.ref[Optimizer]  # whose hook it is; weak, since plans hold hooks and optimizers hold plans
    name: str  # the name of the method
    options: Mapping[str, Any]  # the parameter group as the owner sees it

    def change_(self, xs: Sequence[Tensor], ks: Sequence[int], plan: object = None) -> None:
        """Call the hook with parameters, which have the gradients that are to be changed."""
        owner = self.owner()
        assert owner is not None  # it is taking the step
        for p in xs:
            run_hook(owner, getattr(owner, self.name), p, self.options)

    def known(self, p: Tensor) -> dict[str, Tensor]:
        """Return what the hook remembers of a parameter, by key."""
        owner: Any = self.owner()
        return owner._known(p)

    def put(self, p: Tensor, values: Mapping[str, Tensor]) -> None:
        """Remember first values of a parameter, by key."""
        owner: Any = self.owner()
        owner._put(p, values)


Transform: TypeAlias = Entrywise | ByNorm | PerDatum | Remembering | Hook


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One change of the gradients or of the parameters of a group."""

    transform: Transform | None  # None: only scale and shift
    param_ndim: int | None  # how many trailing dimensions of a parameter are one datum
    # scale, bias: what the result is multiplied by, and what is then added
    scale: float = 1.0
    bias: float = 0.0
    # Given to a transform that remembers: a weak reference to `memory(p, name, first)`, which returns what is
    # remembered of a parameter under a name, at first `first(p)`.
    memory: Callable[[], Callable[[Tensor, str, First], Tensor] | None] | None = None

    @property
    def works_on_any_part(self) -> bool:
        """Whether parts of a list of tensors may be changed apart, in any order: it remembers and draws nothing."""
        t = self.transform
        return not isinstance(t, Remembering | Hook) and (not isinstance(t, PerDatum) or t.alike)

    def remembered(self, params: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Return what the transform remembers of parameters, by name."""
        memory = None if self.memory is None else self.memory()
        if memory is None or not isinstance(self.transform, Remembering):
            return {}
        return {name: [memory(p, name, first) for p in params] for name, first in self.transform.remembers.items()}

    @property
    def form(self) -> tuple[Any, ...]:
        """All but the numbers: work that was laid out for a stage serves every stage of the same form."""
        t = self.transform
        if isinstance(t, ByNorm):
            how: Any = t.factor.kind, t.factor.p, t.factor.scale == 1
        elif isinstance(t, Entrywise):
            how = t.kind, t.low is None, t.high is None
        else:
            how = isinstance(t, PerDatum) and t.alike
        return type(t), how, self.param_ndim, self.scale == 1, self.bias == 0


def normalization(p: float, eps: float) -> ByNorm:
    """x / max(‖x‖p, eps)."""
    return ByNorm(NormFactor("normalize", plain(p), plain(eps)))


def signs() -> Entrywise:
    """sign(x); x / |x| where x is complex."""
    return Entrywise("sign")


def clamping(clamp_min: float | None, clamp_max: float | None) -> Entrywise:
    """x moved into [clamp_min, clamp_max]."""
    return Entrywise("clamp", plain(clamp_min), plain(clamp_max))


def selection(share: Callable[[], float], draws: Draws | None = None) -> PerDatum:
    """Keep the 1 - q share of entries of largest magnitude, with q from `share`; with `draws`, anew for each tensor."""
    return _with_share(lambda x, k, q: top_q_(x, q, param_ndim=k), top_q_of_all_, share, draws)


def signed_selection(share: Callable[[], float], draws: Draws | None = None, eps: float = 0.0) -> PerDatum:
    """`selection`, then the sign, then division by the L1 norm, at least `eps`."""

    def select_(x: Tensor, k: int, q: float) -> None:
        if eps <= 1:  # the norm is a whole number
            signed_top_q_(x, q, param_ndim=k)
        else:
            normalize_(top_q_(x, q, param_ndim=k).sign_(), 1, param_ndim=k, eps=eps)

    return _with_share(select_, signed_top_q_of_all_ if eps <= 1 else None, share, draws)


def _with_share(
    select_: Callable[[Tensor, int, float], Any],
    of_all_: Callable[[Sequence[Tensor], Sequence[int], float], Any] | None,
    share: Callable[[], float],
    draws: Draws | None,
) -> PerDatum:
    def drawn() -> PerDatum:
        q = share()
        return PerDatum(lambda x, k: select_(x, k, q))

    if draws is not None:
        return PerDatum(lambda x, k: select_(x, k, share()), alike=False, drawn=drawn, draws=draws)
    q = share()
    together_ = None if of_all_ is None else lambda xs, ks: of_all_(xs, ks, q)
    return PerDatum(lambda x, k: select_(x, k, q), of_all_=together_)


def negated_l1_vertex() -> PerDatum:
    """The negative of the oracle of the L1 ball of radius 1."""
    return PerDatum(lambda g, k: lmo_l1_ball_(g, 1.0, param_ndim=k, negated=True))


def l2_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> ByNorm | PerDatum:
    """The nearest point of the L2 ball, or of the ball and a box."""
    if isinstance(epsilon, Tensor) or lower is not None or upper is not None:
        return _projection(project_l2_ball_, epsilon, lower, upper)
    return ByNorm(NormFactor("ball", 2, plain(epsilon)))


def l1_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> PerDatum:
    """The nearest point of the L1 ball, or of the ball and a box."""
    return _projection(project_l1_ball_, epsilon, lower, upper, project_l1_ball_of_all_)


def linf_projection(epsilon: Number, lower: Bound = None, upper: Bound = None) -> Entrywise | PerDatum:
    """The nearest point of the Linf ball, or of the ball and a box."""
    if isinstance(epsilon, Tensor) or lower is not None or upper is not None:
        return _projection(project_linf_ball_, epsilon, lower, upper)
    return clamping(-epsilon, epsilon)


def _projection(
    project_: Callable[..., Any],
    epsilon: Number,
    lower: Bound,
    upper: Bound,
    of_all_: Callable[..., Any] | None = None,
) -> PerDatum:
    epsilon, lower, upper = plain(epsilon), plain(lower), plain(upper)
    alike = not isinstance(epsilon, Tensor) and lower is None and upper is None
    return PerDatum(
        lambda x, k: project_(x, epsilon, param_ndim=k, lower=lower, upper=upper),
        alike,
        of_all_=None if of_all_ is None or not alike else lambda xs, ks: of_all_(xs, ks, epsilon),
        within=lambda rows, entries: _projection(project_, rows(epsilon), entries(lower), entries(upper), of_all_),
    )


def simplex_projection(total: Number) -> PerDatum:
    """The nearest point with entries ≥ 0 that sum to `total`."""
    total = plain(total)
    alike = not isinstance(total, Tensor)
    return PerDatum(
        lambda x, k: project_simplex_(x, total, param_ndim=k),
        alike,
        of_all_=(lambda xs, ks: project_simplex_of_all_(xs, ks, total)) if alike else None,
        within=lambda rows, entries: simplex_projection(rows(total)),
    )
