"""How much work an evaluation is worth: three budgets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature

from rai_toolbox.perturbations import minimum_norm

#: The defaults of the solvers.
USUAL_STEPS, USUAL_RESTARTS = (signature(minimum_norm).parameters[name].default for name in ("steps", "restarts"))


@dataclass(frozen=True)
class Budget:
    """The sizes of the parts of an evaluation, where they are not asked for one by one."""

    # steps, restarts: of the solvers
    steps: int = USUAL_STEPS
    restarts: int = USUAL_RESTARTS
    radii: int = 8  # how many a default grid has, about
    # The share of the usual samples that a check looks at, and of the random points and directions that it tries.
    checked: float = 1.0
    adaptive: bool = True  # whether attacks without the gradient follow where a check doubts it
    without: tuple[str, ...] = ()  # the checks that are left out

    def of_usual(self, count: int, least: int = 4) -> int:
        """Return how many of so many samples, points or directions a check takes."""
        return min(count, max(least, round(self.checked * count)))


#: By the names that `evaluate` takes. The usual one is that of the solvers' defaults.
BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(
        steps=10,
        restarts=2,
        radii=4,
        checked=0.125,
        adaptive=False,
        without=("finite-differences", "transfer"),
    ),
    "standard": Budget(),
    "thorough": Budget(steps=100, restarts=27),
}


def longer_search(sizes: Budget) -> tuple[int, int]:
    """Return the steps and restarts of a search that those of an evaluation are judged by."""
    if sizes.checked < 1:  # the budget has no room for the usual ones
        return 4 * sizes.steps, sizes.restarts
    return max(sizes.steps, USUAL_STEPS), max(sizes.restarts, USUAL_RESTARTS)
