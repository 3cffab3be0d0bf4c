"""The settings of an evaluation and the box of its perturbations, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.perturbations._ball import check_norm
from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._results import Task, jsonable
from rai_toolbox.robustness.attack._budget import BUDGETS, Budget
from rai_toolbox.robustness.data._samples import Samples, Summary, kind_of

Norm = Literal["l1", "l2", "linf", "l0"]
NORMS = get_args(Norm)

#: Where none of so many draws is an error, the interval of the probability of an error ends below one half.
LEAST_DRAWS = 6


@dataclass(frozen=True)
class Settings:
    """What decides the figures of an evaluation, beside the model and the data."""

    task: Task = "classification"  # the kind of prediction
    norms: tuple[Norm, ...] = ("l2",)  # the norms to measure perturbations in
    # The radii to report per norm; a norm that is missing gets a grid that fits its data.
    epsilons: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extra_epsilons: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # radii to report beside those
    # steps, restarts: of the solvers; None is their own default
    steps: int | None = None
    restarts: int | None = None
    batch_size: int = 128  # samples per call of a solver
    seed: int = 0  # all random choices follow from it
    diagnostics: bool = True  # whether to run the checks of the evaluation itself
    adaptive: bool = True  # whether to attack without the gradient too, where a check doubts it
    queries: int = 5000  # how often a model without a gradient is asked per sample and norm, at most
    budget: str = "standard"  # the sizes of what is not asked for one by one
    draws: int = 1  # how many answers of a random model to an input are one decision
    average: int = 1  # how many random points of the same ball and box are tried per sample and radius
    corruptions: tuple[str, ...] = ()  # the names of the corruptions to try
    severities: tuple[float, ...] = ()  # of the corruptions, ascending
    keep_points: bool = False  # whether the perturbed inputs of all samples are kept
    also_try: tuple[str, ...] = ()  # which earlier evaluations' perturbed inputs are tried too

    @property
    def sizes(self) -> Budget:
        """The sizes of the budget, with the steps and restarts that were asked for instead."""
        asked = {"steps": self.steps, "restarts": self.restarts}
        return replace(BUDGETS[self.budget], **{name: value for name, value in asked.items() if value is not None})

    def grid(self, norm: str) -> tuple[float, ...]:
        """Return the radii that the user gave; empty where a grid is chosen."""
        return self.epsilons.get(norm, ())

    def with_extra(self, norm: str, grid: tuple[float, ...]) -> tuple[float, ...]:
        """Return a grid with the extra radii in it."""
        return tuple(sorted({*grid, *self.extra_epsilons.get(norm, ())}))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return jsonable(vars(self))

    @classmethod
    def checked(cls, **options: Any) -> Settings:
        """Return settings from options in any form that `evaluate` takes; their names and defaults are the fields'.

        Raises InputError if one of them is not allowed; the message says what was given and what is.
        """
        given = cls(**options)
        if given.task not in get_args(Task):
            raise InputError(f"{arg('task')} must be 'classification' or 'regression', got {given.task!r}")
        if given.budget not in BUDGETS:
            raise InputError(f"{arg('budget')} must be one of {', '.join(BUDGETS)}, got {given.budget!r}")
        norms: Any = given.norms
        named = tuple(map(_name_of, (norms,) if isinstance(norms, str | int | float) else norms))
        if not named:
            raise InputError(f"{arg('norms')} is empty: name at least one of l1, l2, linf, l0")
        if given.task == "regression" and "l0" in named:
            raise InputError(f"{arg('norms')}: 'l0' is for classification only")
        extra = {norm: grid for norm, grid in (given.extra_epsilons or {}).items() if grid}
        return replace(
            given,
            norms=tuple(dict.fromkeys(named)),
            epsilons=_grids(given.epsilons, named),
            extra_epsilons=_grids(extra, named),
            steps=None if given.steps is None else _whole("steps", given.steps, least=1),
            restarts=None if given.restarts is None else _whole("restarts", given.restarts, least=1),
            batch_size=_whole("batch_size", given.batch_size, least=1),
            seed=_whole("seed", given.seed, least=0),
            diagnostics=bool(given.diagnostics),
            adaptive=bool(given.adaptive),
            queries=_whole("queries", given.queries, least=100),
            draws=_draws(given.draws),
            average=_whole("average", given.average, least=0),
            corruptions=tuple(given.corruptions),
            severities=_severities(given.severities) if given.corruptions else (),
            keep_points=bool(given.keep_points),
        )


def _name_of(norm: Any) -> str:
    try:
        return check_norm(norm)
    except ValueError:
        raise InputError(f"{arg('norms')} must be one of {', '.join(NORMS)}, got {norm!r}") from None


def _grids(
    epsilons: Sequence[float] | Mapping[str, Sequence[float]] | None, norms: tuple[str, ...]
) -> dict[str, tuple[float, ...]]:
    if epsilons is None:
        return {}
    if not isinstance(epsilons, Mapping):
        epsilons = dict.fromkeys(norms, epsilons)
    epsilons = {_name_of(norm): grid for norm, grid in epsilons.items()}
    for norm in epsilons:
        if norm not in norms:
            raise InputError(f"{arg('epsilons')} are given for norm {norm!r}, but the norms are {', '.join(norms)}")
    return {norm: _grid(norm, grid) for norm, grid in epsilons.items()}


def _grid(norm: str, grid: Sequence[float]) -> tuple[float, ...]:
    try:
        values = sorted({float(value) for value in grid})
    except (TypeError, ValueError):
        raise InputError(f"{arg('epsilons')} must be numbers, got {grid!r}") from None
    for value in values:
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{arg('epsilons')} must be a finite number that is not negative, got {value:g}")
        if norm == "l0" and value != int(value):
            raise InputError(f"epsilon of l0 must be a whole number (how many features may change), got {value:g}")
    positive = tuple(value for value in values if value > 0)
    if not positive:
        raise InputError(f"{arg('epsilons')} must hold at least one number above 0")
    return positive


def _severities(severities: Sequence[float]) -> tuple[float, ...]:
    try:
        values = sorted({float(value) for value in severities})
    except (TypeError, ValueError):
        raise InputError(f"{arg('severities')} must be numbers, got {severities!r}") from None
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise InputError(f"{arg('severities')} must be finite numbers above 0, got {severities!r}")
    # A corruption may look its strength up in a list.
    return tuple(int(value) if value == int(value) else value for value in values)


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least or value >= 2**63:
        raise InputError(f"{arg(name)} must be a whole number, at least {least}, got {value!r}")
    return int(value)


def _draws(value: Any) -> int:
    draws = _whole("draws", value, least=1)
    if 1 < draws < LEAST_DRAWS:
        raise InputError(
            f"{arg('draws')} must be 1, or at least {LEAST_DRAWS}: where fewer draws all agree, the 95 % interval"
            f" still contains one half; got {draws}"
        )
    return draws


@dataclass(frozen=True)
class Box:
    """Where perturbed inputs may lie."""

    # lower, upper: the bounds: None, a number, or one per feature in the shape of a sample
    lower: float | NDArray | None = None
    upper: float | NDArray | None = None
    movable: NDArray | None = None  # where the input may change, bool, in the shape of a sample; None means everywhere
    chosen: str = "given"  # who chose the bounds, for the report: ``"given"`` or ``"from the data"``

    @property
    def ends(self) -> tuple[float | NDArray | None, float | NDArray | None]:
        """The lower and the upper bound."""
        return self.lower, self.upper

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return lower and upper bounds that broadcast to `x`; a frozen feature has its value as both."""
        if self.lower is None and self.movable is None:
            return None
        lower, upper = (
            torch.as_tensor(default if bound is None else bound, dtype=x.dtype, device=x.device)
            for bound, default in ((self.lower, -math.inf), (self.upper, math.inf))
        )
        if self.movable is not None:
            movable = torch.from_numpy(self.movable).to(x.device)
            lower, upper = torch.where(movable, lower, x), torch.where(movable, upper, x)
        return lower, upper

    def to_dict(self) -> dict[str, Any]:
        """Return the box as JSON has it."""

        def plain(bound: float | NDArray | None) -> Any:
            return bound.tolist() if isinstance(bound, np.ndarray) else bound

        return {
            "lower": plain(self.lower),
            "upper": plain(self.upper),
            "chosen": self.chosen,
            "frozen_features": 0 if self.movable is None else int((~self.movable).sum()),
            "movable": None if self.movable is None else self.movable.tolist(),
        }


def make_box(samples: Samples, summary: Summary, bounds: Any, mask: Any) -> Box:
    """Return the box of an evaluation, and see that all samples lie in it.

    samples: the data.
    summary: of the same data.
    bounds: numbers or arrays in the shape of a sample. ``"auto"``: [0, 1] for image-shaped data in it, [0, 255] for
        images of whole numbers (uint8), else none.
    mask: True where the input may change.

    Raises InputError if the bounds are not bounds, or a sample lies outside; the message says which.
    """
    movable = None
    if mask is not None:
        movable = _of_sample_shape("the mask", mask, samples.shape).astype(bool)
        if not movable.any():
            raise InputError(f"{arg('mask')} is False everywhere: nothing may change")
    if isinstance(bounds, str):
        if bounds != "auto":
            raise InputError(f"{arg('bounds')} must be 'auto', None or (lower, upper), got {bounds!r}")
        limit = _natural_limit(samples, summary)
        chosen = "from the data"
        return Box(None, None, movable, chosen) if limit is None else Box(0.0, limit, movable, chosen)
    if bounds is None:
        return Box(None, None, movable)
    try:
        lower, upper = bounds
    except (TypeError, ValueError):
        raise InputError(f"{arg('bounds')} must be a pair (lower, upper), got {bounds!r}") from None
    lower, upper = (_bound(bound, samples.shape) for bound in (lower, upper))
    if np.any(np.asarray(lower) >= np.asarray(upper)):
        raise InputError(f"the lower bound must be less than the upper, got {_brief(lower)} and {_brief(upper)}")
    _check_inside(samples, summary, lower, upper)
    return Box(lower, upper, movable)


def _natural_limit(samples: Samples, summary: Summary) -> float | None:
    # A film or an image of many bands too; a series that happens to lie in [0, 1] may leave it.
    pictured = kind_of(samples.shape, samples.feature_names) == "image" or len(samples.shape) >= 3
    if not pictured or summary.minimum < 0:
        return None
    if summary.maximum <= 1:
        return 1.0
    return 255.0 if samples.rows.dtype == np.uint8 and samples.scale == 1.0 else None


def _bound(bound: Any, shape: tuple[int, ...]) -> float | NDArray:
    array = np.asarray(bound, dtype=np.float64) if not isinstance(bound, (str, bytes)) else np.array(np.nan)
    if np.isnan(array).any():
        raise InputError(f"{arg('bounds')} must be numbers, got {_brief(bound)}")
    return float(array) if array.ndim == 0 else _of_sample_shape("a bound", array, shape)


def _of_sample_shape(what: str, value: Any, shape: tuple[int, ...]) -> NDArray:
    array = np.asarray(value)
    try:
        # A copy: an array of a file may be read-only, and torch warns of these.
        return np.array(np.broadcast_to(array, shape))
    except ValueError:
        raise InputError(f"{what} has shape {array.shape}, expected that of one sample, {shape}") from None


def _check_inside(samples: Samples, summary: Summary, lower: float | NDArray, upper: float | NDArray) -> None:
    if summary.minimum >= np.max(lower) and summary.maximum <= np.min(upper):
        return
    for start in range(0, len(samples), 1024):
        x = samples.inputs(start, start + 1024).numpy()
        # In float32 both ways: a bound of 0.1 must not exclude the sample 0.1.
        outside = (x < np.asarray(lower, np.float32)) | (x > np.asarray(upper, np.float32))
        if outside.any():
            index = int(np.argmax(outside.reshape(len(x), -1).any(axis=1)))
            value = x[index][outside[index]][0]
            raise InputError(
                f"sample {start + index} of x has the value {value:g}, outside the bounds"
                f" {_brief(lower)},{_brief(upper)};"
                f" x lies in [{summary.minimum:g}, {summary.maximum:g}]"
            )


def _brief(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, (int, float)) else f"an array of shape {np.shape(bound)}"
