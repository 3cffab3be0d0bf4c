"""The arguments that the solvers share, checked once and laid out as matrices; and the best points seen so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rai_toolbox._freezing import evaluating, frozen
from rai_toolbox.kernels._points import by_blocks, distances, put_rows_
from rai_toolbox.perturbations import losses as L
from rai_toolbox.perturbations._ball import Ball, Norm, check_norm, rows_of, some_of
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import Noise, draw_seed, seeded
from rai_toolbox.perturbations._query import Answer, Loss, Objective, Query, make_objective, per_row
from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.perturbations._solution import Solution

# Without bounds: how many times the largest entry of a datum an entry may reach in a search for the first success. Then
# so many times as far in each sweep, up to a limit.
_FAR, _FARTHER, _FARTHEST = 8.0, 8.0, 2.0**12
# More than any run takes: keeps the random draws of one run apart from those of the next.
MOST_STEPS = 2**20


@dataclass(frozen=True)
class Problem:
    """N data as the rows of a matrix, with the objective of each, and the model."""

    query: Query
    shape: torch.Size
    data: Tensor
    target: Tensor
    lower: Tensor | None
    upper: Tensor | None
    noise: Noise
    norm: str
    bounded: bool = False
    """Whether both bounds of every entry are finite."""
    far: float = _FAR
    _last: dict[str, Any] = field(default_factory=dict)
    """Of the rows that were asked about last: they are often the same."""

    def data_of(self, rows: Tensor) -> Tensor:
        return self._of_last(rows)["data"]

    def target_of(self, rows: Tensor) -> Tensor:
        return self._of_last(rows)["target"]

    def _of_last(self, rows: Tensor) -> dict[str, Any]:
        if self._last.get("rows") is not rows:
            self._last.update(rows=rows, data=some_of(self.data, rows), target=self.target[rows], range=None)
        return self._last

    def in_sweep(self, sweep: int) -> Problem:
        """Return the problem with a wider search range where there are no bounds."""
        return replace(self, far=min(_FAR * _FARTHER**sweep, _FARTHEST))

    def gathered(self, rows: Tensor, noise: Noise) -> Problem:
        """Return the problem of these rows, of which several may be the same, with random numbers of their own."""
        lower, upper = (rows_of(bound, rows, len(self.data)) for bound in (self.lower, self.upper))
        return replace(
            self, shape=torch.Size((len(rows), *self.shape[1:])), data=self.data[rows], target=self.target[rows],
            lower=lower, upper=upper, noise=noise, _last={},
        )  # fmt: skip

    @property
    def objective(self) -> Objective:
        return self.query.objective

    def ball(self, epsilon: Tensor) -> Ball:
        """The allowed perturbations for radii of shape (N,)."""
        return Ball(self.norm, self.data, epsilon.double()[:, None], self.lower, self.upper)

    def ball_of(self, rows: Tensor, epsilon: Tensor) -> Ball:
        """Those of some rows, for radii of shape (n,)."""
        lower, upper = (rows_of(bound, rows, len(self.data)) for bound in (self.lower, self.upper))
        return Ball(self.norm, self.data_of(rows), epsilon.double()[:, None], lower, upper)

    def ask(self, rows: Tensor, x: Tensor, loss_fn: Loss, stream: int) -> Answer:
        """Ask the model about points `x` of `rows`. A gradient that is zero is replaced by a random direction.

        `stream` numbers the random draw.
        """
        return self.query.ask(x, self.target_of(rows), loss_fn, lambda grad: self.noise.directions(grad, rows, stream))

    def look(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Score and decision at points `x` of `rows`, without a gradient."""
        losses, achieved = self.query.evaluate(x, self.target_of(rows), beyond_rounding=True)
        return losses * self.objective.sign, achieved

    def movable(self) -> Tensor:
        """Whether a search can start from each datum, (N,): not from NaN or infinity, nor without entries."""
        if not self.data.shape[1]:
            return torch.zeros(len(self.data), dtype=torch.bool, device=self.data.device)
        return self.data.isfinite().all(1)

    def box(self, rows: Tensor) -> Ball:
        """The box around rows: a ball without a radius."""
        return replace(self.ball(self.data.new_zeros(len(self.data)))[rows], norm="l0")

    def search_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The range of values to try for each entry: the box, or a multiple of the data's size without one."""
        last = self._of_last(rows)
        known: tuple[Tensor, Tensor] | None = last["range"]
        if known is not None and last["far"] == self.far:
            return known
        lower, upper = (rows_of(bound, rows, len(self.data)) for bound in (self.lower, self.upper))
        data = last["data"]
        if self.bounded and lower is not None and upper is not None:
            return lower.expand_as(data), upper.expand_as(data)
        size = data.abs().amax(dim=1, keepdim=True)
        far = self.far * torch.where(size > 0, size, 1.0)
        low, high = data - far, data + far
        if lower is not None and upper is not None:
            low, high = torch.where(lower.isinf(), low, lower), torch.where(upper.isinf(), high, upper)
        last.update(far=self.far, range=(low, high))
        return low, high

    def farthest(self, rows: Tensor) -> Tensor:
        """The largest distance to try, (n,)."""

        def of(part: slice) -> Tensor:
            some = rows if part == slice(None) else rows[part]
            data, (low, high) = self.data_of(some), self.search_range(some)
            return distances(torch.maximum(high - data, data - low), torch.zeros_like(data), self.norm)

        return by_blocks(of, self.data_of(rows))

    def around(self, rows: Tensor, x: Tensor, stream: int) -> Tensor:
        """Random points around `x` of `rows`, whose entries differ by up to half of their range.

        Where a network ignores small changes, its gradient says there what large ones will do.
        """
        low, high = self.search_range(rows)
        most = 1.0 if self.bounded else 0.5 / self.far

        def shifted(part: slice) -> Tensor:
            share, least, largest = self.noise.uniform(rows[part], stream), low[part], high[part]
            shift = (largest - least) * (share[:, :1] * most)
            return torch.clamp(x[part] + shift.mul_(share.sub_(0.5)).to(x.dtype), least, largest)

        return by_blocks(shifted, x)

    def width(self, rows: Tensor) -> Tensor:
        """A typical size of a large change of an entry, (n, 1)."""
        low, high = self.search_range(rows)
        width = (high - low).mean(dim=1, keepdim=True)
        if self.lower is None:
            width = width / (2 * self.far)
        return torch.where(width > 0, width, 1.0)


class Found(Protocol):
    """What is given every point that a run within the ball evaluates."""

    dead: Tensor

    @property
    def achieved(self) -> Tensor: ...

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> None: ...


class Best:
    """The best point seen of each row.

    With a decision to change, the first point that changes it stays; until then the score counts. The score of a NaN is
    -inf, so it never wins.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("x", "score", "achieved", "dead", "blind")

    def __init__(self, problem: Problem, by_score_alone: bool) -> None:
        self._by_score_alone = by_score_alone
        n = len(problem.data)
        self.x = problem.data.clone()
        self.score = torch.full((n,), -torch.inf, dtype=torch.float64, device=problem.data.device)
        self.achieved = torch.zeros(n, dtype=torch.bool, device=problem.data.device)
        self.dead = torch.zeros(n, dtype=torch.int64, device=problem.data.device)
        """How often the gradient was zero."""
        self.blind = torch.zeros_like(self.achieved)
        """Where it was too often in the first run."""

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> None:
        better = score > self.score[rows]
        if not self._by_score_alone:
            had = self.achieved[rows]
            better = (achieved | better) > had
        put_rows_((self.x, self.score, self.achieved), rows, better, (x, score, achieved))


@contextmanager
def solving(model: Any, criterion: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Freeze modules in eval mode, turn gradients on, seed random numbers; restore all of it at the end."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seeded(seed, device))
        for module in (model, criterion):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
                stack.enter_context(frozen(module))
        yield


def as_data(data: Any) -> Tensor:
    # as_tensor would move a tensor to the default device
    data = (data if isinstance(data, Tensor) else torch.as_tensor(data)).detach()
    if not data.is_floating_point():
        raise TypeError(f"data must be floating point, for they are perturbed continuously; got {data.dtype}")
    if data.ndim == 0:
        raise ValueError("data must have a batch dimension first: shape (N, ...); got a 0-d tensor")
    return data.clone() if data.is_inference() else data


def as_target(target: Any, data: Tensor) -> Tensor:
    target = torch.as_tensor(target, device=data.device).detach()
    if target.dtype == torch.bool or not (target.is_floating_point() or target.is_complex()):
        target = target.long()
    if target.ndim == 0 or len(target) != len(data):
        raise ValueError(
            f"target must have one row per datum: data have {len(data)}, target has shape {tuple(target.shape)}"
        )
    return target.clone() if target.is_inference() else target


def as_epsilon(epsilon: Any, n: int, device: torch.device, norm: str) -> Tensor:
    """Radii of shape (n,), float64."""
    radii = torch.as_tensor(epsilon, dtype=torch.float64, device=device).detach()
    if radii.ndim > 1 and radii.numel() == n:
        radii = radii.reshape(n)
    if radii.ndim > 1 or radii.numel() not in (1, n):
        raise ValueError(
            f"epsilon must be a number or have one entry per datum, shape ({n},); got shape {tuple(radii.shape)}. For "
            f"several radii, ask for the nearest error of each datum, minimum_norm(...).robust_accuracy(radii), or "
            f"call once per radius"
        )
    if not bool((radii >= 0).all()):
        raise ValueError(f"epsilon must be ≥ 0 and not NaN; got {epsilon!r}")
    if norm == "l0":
        radii = radii.floor()
    return radii.expand(n) if radii.ndim == 0 or len(radii) != n else radii


def positive_int(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be ≥ {least}; got {value}")
    return value


@dataclass(frozen=True)
class SharedArguments:
    """The arguments that `worst_case` and `minimum_norm` share, checked."""

    model: Callable[[Tensor], Tensor]
    data: Tensor
    target: Tensor
    norm: str
    box: tuple[Tensor, Tensor] | None
    objective: Objective
    criterion: Loss | None
    samples: int
    batch_size: int
    seed: int


def check_shared_arguments(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: Norm,
    bounds: Bounds,
    targeted: bool,
    criterion: Loss | None,
    margin: Loss | None,
    samples: int,
    batch_size: int | None,
    generator: torch.Generator | None,
) -> SharedArguments:
    if not callable(model):
        raise TypeError(f"model must be callable; got {type(model).__name__}")
    data = as_data(data)
    target = as_target(target, data)
    return SharedArguments(
        model=model,
        data=data,
        target=target,
        norm=check_norm(norm),
        box=check_bounds(bounds, data),
        objective=make_objective(target, criterion, margin, targeted),
        criterion=criterion,
        samples=positive_int("samples", samples),
        batch_size=max(len(data), 1) if batch_size is None else positive_int("batch_size", batch_size),
        seed=draw_seed(generator),
    )


def batches(shared: SharedArguments) -> Iterator[tuple[slice, Problem]]:
    """A problem for each batch of data."""
    data, box = shared.data, shared.box
    bounded = box is not None and bool((box[0].isfinite() & box[1].isfinite()).all())
    query = Query(shared.model, data.shape[1:], shared.objective, shared.samples)
    for begin in range(0, max(len(data), 1), shared.batch_size):
        part = slice(begin, begin + shared.batch_size)
        matrix = data[part].reshape(len(data[part]), data.shape[1:].numel())
        lower, upper = (None, None) if box is None else (_as_matrix(bound, data, part) for bound in box)
        noise = Noise(matrix, shared.seed)
        yield (
            part,
            Problem(query, data[part].shape, matrix, shared.target[part], lower, upper, noise, shared.norm, bounded),
        )


def _as_matrix(bound: Tensor, data: Tensor, part: slice) -> Tensor:
    """A matrix that broadcasts to the part of the data, of one row if the bound is the same for every datum."""
    if bound.ndim < data.ndim or bound.shape[0] == 1:
        return bound.expand(1, *data.shape[1:]).reshape(1, -1) if bound.numel() > 1 else bound.reshape(1, 1)
    bound = bound.expand(data.shape)[part]
    return bound.reshape(len(bound), -1)


def ask_at_data(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the unperturbed data: where the model is wrong already, no perturbation is needed."""
    with torch.no_grad():
        output = problem.query.output(problem.data)
        objective = problem.objective
        if objective.default:
            _check_labels(output, problem.target)
        if objective.achieved is None:
            achieved = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        else:
            achieved = per_row(objective.achieved(output, problem.target), len(output), "margin")
        # Second: a margin may be the criterion too, and the message is to name what was given.
        score = per_row(objective.score(output, problem.target), len(output), "criterion")
        return score, achieved & ~score.isnan(), output


def _check_labels(output: Tensor, target: Tensor) -> None:
    classes = L.as_logits(output, target).shape[1]
    if classes < 2:
        raise ValueError("the model returns no logits")
    if len(target) and not bool(((target >= 0) & (target < classes)).all()):
        raise ValueError(
            f"target must lie in [0, {classes - 1}], since the model has {classes} classes; it ranges from "
            f"{int(target.min())} to {int(target.max())}"
        )


def solution_at(problem: Problem, x: Tensor, never: Tensor | None = None) -> Solution:
    """Evaluate the model once more at the points to return. Rows of `never` count as not found."""
    try:
        losses, achieved = problem.query.evaluate(x, problem.target, beyond_rounding=False)
    except SolveEnded:  # said once: now the answer comes
        losses, achieved = problem.query.evaluate(x, problem.target, beyond_rounding=False)
    distance = distances(x, problem.data, problem.norm)
    if never is not None:
        achieved = achieved & ~never
        distance = torch.where(never, torch.inf, distance)
    return Solution(x.reshape(problem.shape), losses, achieved, distance, problem.objective.achieved is not None)
