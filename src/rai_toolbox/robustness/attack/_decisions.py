"""An attack that sees decisions alone: it walks along the boundary, so no score can lead it away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ORDER = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}
_BISECTIONS = 12
_STARTS = 8

Wrong = Callable[[Tensor, Tensor], Tensor]


def walk_along_boundary(
    wrong: Wrong,
    x: Tensor,
    pool: Tensor,
    *,
    norm: str,
    bounds: tuple[Tensor, Tensor] | None,
    generator: torch.Generator,
    rounds: int = 20,
    draws: int = 100,
) -> Tensor:
    """Return, for each row of `x`, the nearest point found whose decision is wrong; the row itself if there was none.

    From the nearest of other inputs that are decided otherwise, straight towards `x` to the boundary; there the
    normal of the boundary is estimated from the decisions at random points around; then to where a plane with that
    normal is nearest to `x` in the norm, and back to the boundary.

    wrong: from points (n, ...) and the indices of their rows (n,) to which decisions are wrong.
    x, shape (N, ...): inputs that are decided right.
    pool, shape (M, ...): where to start from: inputs, of any class.
    rounds, draws: how often the normal is estimated, from how many decisions each.

    References
    ----------
    Chen, J., Jordan, M. I. and Wainwright, M. J. (2020). HopSkipJumpAttack. IEEE S&P.
    Rahmati, A. et al. (2020). GeoDA: a geometric framework for black-box adversarial attacks. CVPR.
    """  # fmt: skip
    walk = _Walk(wrong, x, norm, bounds, generator)
    walk.start(pool)
    for number in range(rounds):
        walk.round(draws, number)
    return walk.nearest.reshape(x.shape)


class _Walk:
    def __init__(
        self, wrong: Wrong, x: Tensor, norm: str, bounds: tuple[Tensor, Tensor] | None, generator: torch.Generator
    ) -> None:
        self._ask, self._shape, self._norm, self._generator = wrong, x.shape, norm, generator
        self._x = x.flatten(1)
        whole = None if bounds is None else [bound.expand(x.shape).flatten(1) for bound in bounds]
        self._low, self._high = whole or (None, None)
        self.nearest = self._x.clone()
        self._distance = torch.full((len(x),), torch.inf, device=x.device)
        self._normal = torch.zeros_like(self._x)

    def _wrong(self, points: Tensor, rows: Tensor) -> Tensor:
        return self._ask(points.reshape(len(points), *self._shape[1:]), rows)

    def _inside(self, points: Tensor, rows: Tensor) -> Tensor:
        if self._low is None or self._high is None:
            return points
        return torch.minimum(torch.maximum(points, self._low[rows]), self._high[rows])

    def _take(self, points: Tensor, rows: Tensor) -> None:
        """Keep points that are known to be wrong, where they are nearer."""
        far = torch.linalg.vector_norm(points - self._x[rows], _ORDER[self._norm], dim=1).float()
        nearer = far < self._distance[rows]
        self._distance[rows[nearer]] = far[nearer]
        self.nearest[rows[nearer]] = points[nearer]

    def _towards(self, points: Tensor, rows: Tensor) -> Tensor:
        """Bisect between points that are wrong and the inputs; return points that are wrong, just."""
        right, bad = self._x[rows], points
        for _ in range(_BISECTIONS):
            middle = (right + bad) / 2
            wrong = self._wrong(middle, rows)[:, None]
            right, bad = torch.where(wrong, right, middle), torch.where(wrong, middle, bad)
        return bad

    def start(self, pool: Tensor) -> None:
        others = pool.flatten(1)
        every = torch.arange(len(self._x), device=self._x.device)
        gap = torch.cdist(self._x.float(), others.float())
        tried = torch.zeros(len(every), dtype=torch.long, device=every.device)
        for place in gap.argsort(dim=1).T:
            rows = every[tried < _STARTS]
            if not len(rows):
                break
            points = self._inside(others[place[rows]].to(self._x), rows)
            wrong = self._wrong(points, rows)
            rows, points = rows[wrong], points[wrong]
            if len(rows):
                tried[rows] += 1
                self._take(self._towards(points, rows), rows)

    def round(self, draws: int, number: int) -> None:
        rows = torch.nonzero(self._distance.isfinite())[:, 0]
        if not len(rows):
            return
        here, x = self.nearest[rows], self._x[rows]
        away = here - x
        length = torch.linalg.vector_norm(away, dim=1, keepdim=True)
        noise = torch.randn(draws, *here.shape, generator=self._generator).to(here)
        noise = noise / torch.linalg.vector_norm(noise, dim=2, keepdim=True)
        size = length * (0.3, 0.15, 0.08)[number % 3]
        around = self._inside(here + size * noise, rows)
        wrong = self._wrong(around.flatten(0, 1), rows.repeat(draws)).reshape(draws, -1, 1).to(here.dtype)
        normal = ((wrong - wrong.mean(dim=0)) * (around - here) / size.clamp_min(1e-12)).mean(dim=0)
        normal = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True).clamp_min(1e-12)
        # What earlier estimates said of nearby points helps.
        self._normal[rows] = 0.5 * self._normal[rows] + normal
        normal = self._normal[rows]
        rise = (normal * away).sum(dim=1, keepdim=True)
        for factor in (1.0, 0.5, 0.25, 0.1):
            target = self._plane(x, normal, rise, rows)
            point = here + factor * (target - here)
            for push in (0.0, 0.05, 0.15):
                tried = self._inside(point + push * factor * length * normal, rows)
                wrong = self._wrong(tried, rows)
                if wrong.any():
                    self._take(self._towards(tried[wrong], rows[wrong]), rows[wrong])

    def _plane(self, x: Tensor, normal: Tensor, rise: Tensor, rows: Tensor) -> Tensor:
        """Return the point nearest to `x` at which `normal` has risen by `rise`, in the norm and the box."""
        low = torch.full_like(x, -torch.inf) if self._low is None else self._low[rows] - x
        high = torch.full_like(x, torch.inf) if self._high is None else self._high[rows] - x
        rise = rise.clamp_min(0)
        room = torch.where(normal > 0, high, low)
        steep = normal.abs()
        if self._norm == "l1":
            order = steep.argsort(dim=1, descending=True)
            gain = (steep * room.abs().clamp_max(1e6)).gather(1, order)
            before = gain.cumsum(dim=1) - gain
            part = ((rise - before) / gain.clamp_min(1e-30)).clamp(0, 1)
            move = torch.zeros_like(x).scatter(1, order, part * room.abs().clamp_max(1e6).gather(1, order))
            return x + move * normal.sign()
        # Of those that do not reach a wall, all the same (Linf) or in proportion (L2): the factor by bisection.
        lower, upper = torch.zeros_like(rise), torch.full_like(rise, 1e3)
        shape = normal.sign() if self._norm == "linf" else normal
        for _ in range(30):
            middle = (lower + upper) / 2
            reached = (normal * torch.minimum(torch.maximum(middle * shape, low), high)).sum(dim=1, keepdim=True)
            lower, upper = torch.where(reached < rise, middle, lower), torch.where(reached < rise, upper, middle)
        return x + torch.minimum(torch.maximum(upper * shape, low), high)
