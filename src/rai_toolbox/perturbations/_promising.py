"""In which order the runs of `worst_case` from outside the ball are made, and for which data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.perturbations._nearest_found import NearestFound

# Of (a, b): another run is made if the nearest known error is at most 1 + a + b radii away when no step is spent, at
# most 1 + b when all are. Later runs of `minimum_norm` showed how much nearer they come.
_SLACK = {"linf": (0.4, 0.02), "l2": (0.8, 0.02), "l1": (0.8, 0.05)}

# But in L0, each row has a run for so many classes, and then so many runs from far outside. (On six networks 2,230
# samples withstood Auto-PGD in Linf and L2: runs for the three classes broke 69, those for six others none, those from
# afar 42. In L1 what the first run from afar leaves more than .31 radii outside, no later one broke; runs for the six
# others, 2,263 on nine networks, broke none, and are not made.)
_CLASSES, _FROM_AFAR = 3, {"linf": 3, "l2": 3, "l1": 1}
# After `_LATEST` runs from far outside, a row is given up that would not come within the radius in as many runs as it
# has evaluations for, at `_PACE` times the speed of the latest ones, in radii a run, and `_LEAST_SPEED`.
# (In L1 .006 broke less than AutoAttack in one of 20 sets, .020 took more than a tenth of its passes in another.)
_LATEST = 4
_PACE, _LEAST_SPEED = {"linf": 3.0, "l2": 3.0, "l1": 1.0}, {"linf": 0.0006, "l2": 0.002, "l1": 0.012}
# In L1, for rows whose nearest error is at most `_JUST_OUTSIDE` radii outside, and no nearer for `_LATEST` runs,
# two of the next runs are Auto-PGD within the ball, of `_LONG` times the steps: walks end at few entries that change
# much, which need not be the nearest error.
_JUST_OUTSIDE, _LONG, _INSIDE = 0.05, 2, range(_LATEST + 3, _LATEST + 5)


class Promising:
    """Which rows are worth more runs: by how near their errors are, and how fast they come nearer.

    nearest: the nearest points found.
    radii, shape (N,)
    classes: how many classes have a run of their own.
    runs: as many evaluations as these take are made at most.
    tried: the classes were tried already, from inside the ball.
    in_turn: every class has its run first.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("_gaps",)

    def __init__(
        self,
        norm: str,
        nearest: NearestFound,
        radii: Tensor,
        classes: int,
        runs: int,
        *,
        tried: bool,
        in_turn: bool,
    ) -> None:
        self._norm, self._nearest, self._radii = norm, nearest, radii
        self._classes, self._runs, self._tried = classes, runs, tried
        self._in_turn = (in_turn and not tried) or norm not in _LEAST_SPEED
        # Before each of the latest runs: how many radii the nearest error was outside.
        self._gaps = radii.new_full((_LATEST, len(radii)), torch.inf)

    def order(self) -> Iterable[Iterable[int]]:
        """The numbers of the runs of a `Search`, in turn; what comes after some of them depends on what they find."""
        some, n = min(_CLASSES, self._classes), self._classes
        if self._tried:
            return (count(n),)
        if self._in_turn:
            return (count(),)
        others = range(some, n) if self._norm != "l1" else range(0)
        certain = n + _FROM_AFAR[self._norm]
        last = count(n + _LATEST)
        # In Linf these are as long as the first ones: after each, fewer rows are worth another.
        then = ([number] for number in last) if self._norm == "linf" else [last]
        return chain((range(some), range(n, certain), range(certain, n + _LATEST), others), then)

    def of(self, rows: Tensor, numbers: Sequence[int], spent: Tensor, always: Tensor) -> Tensor:
        """Return those of the rows that are worth these runs, which are made side by side.

        spent, shape (N,): the share of its evaluations that each row has used.
        always, shape (N,): rows that are worth it in any case.
        """
        if self._norm not in _SLACK:
            return rows
        gaps, later = self._nearest.distance / self._radii - 1, numbers[0] - self._classes
        before = self._gaps[numbers[0] % _LATEST].clone()
        if later >= 0:
            self._gaps[[number % _LATEST for number in numbers]] = gaps
        certain = numbers[0] < (self._classes if self._in_turn else _CLASSES)
        if certain or (0 <= later < _FROM_AFAR[self._norm] and not self._in_turn):
            return rows
        wide, narrow = _SLACK[self._norm]
        worth = gaps <= narrow + wide * (1 - spent).clamp_min(0) ** 3
        if later >= _LATEST and self._norm in _LEAST_SPEED:
            speed = (before - gaps).nan_to_num(nan=0.0) / _LATEST
            pace = _LEAST_SPEED[self._norm] + _PACE[self._norm] * speed
            worth &= gaps <= pace * (1 - spent) * self._runs
        return rows[(worth | always)[rows]]

    def within(self, rows: Tensor, numbers: Sequence[int], spent: Tensor) -> tuple[Tensor, int, int] | None:
        """Which of the rows make runs within the ball instead of these, shape (n,); how many; how many times as long.

        None: no row does.
        """
        several = sum(number - self._classes in _INSIDE for number in numbers)
        if self._norm != "l1" or not several:
            return None
        gaps = self._nearest.distance / self._radii - 1
        stuck = (gaps <= _JUST_OUTSIDE) & (self._gaps == gaps).all(0)
        return (stuck & ((1 - spent) * self._runs >= several * _LONG))[rows], several, _LONG
