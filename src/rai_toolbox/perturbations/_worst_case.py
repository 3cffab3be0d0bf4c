"""The worst perturbation within a given radius."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import seen
from rai_toolbox.perturbations._attack_losses import ClassLosses, LossOfRows
from rai_toolbox.perturbations._auto_pgd import auto_pgd
from rai_toolbox.perturbations._ball import Ball, Norm
from rai_toolbox.perturbations._bounds import Bounds
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import (
    MOST_STEPS,
    Best,
    Found,
    Problem,
    as_epsilon,
    ask_at_data,
    batches,
    check_shared_arguments,
    positive_int,
    solution_at,
    solving,
)
from rai_toolbox.perturbations._promising import Promising
from rai_toolbox.perturbations._query import Loss
from rai_toolbox.perturbations._random_search import search_randomly
from rai_toolbox.perturbations._resuming import Part, SolveEnded, resume, tell
from rai_toolbox.perturbations._search import Search
from rai_toolbox.perturbations._side_by_side import Copies
from rai_toolbox.perturbations._solution import Solution, concatenate

# The last walk is made from errors no further away than this many radii.
_NEAR = {"linf": 1.005, "l2": 1.005, "l1": 1.1, "l0": 1.3}

# The searches ignore points further away than this many radii.
_LIMIT = {"linf": 1.5, "l2": 2.0, "l1": 3.0}

# A datum is searched at random if more than this share of the gradients of its first run is zero.
_BLIND = 0.2


def worst_case(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: Norm,
    epsilon: float | Tensor,
    bounds: Bounds = None,
    targeted: bool = False,
    criterion: Loss | None = None,
    margin: Loss | None = None,
    steps: int = 50,
    restarts: int = 18,
    early_stop: bool = True,
    samples: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Solution:
    """Find, for each datum, the perturbation within a radius that is worst for the model.

    There is no step size to choose: Auto-PGD [1]_ [2]_ finds its own. Data whose decision has changed leave the batch.

    Parameters
    ----------
    model : Callable[[Tensor], Tensor]
        Differentiable. If an `nn.Module`, it is frozen and in eval mode during the solve, and put back after it.
    data : Tensor or array-like, shape (N, ...)
        Floating point, in any range.
    target : Tensor or array-like, shape (N, ...)
        Class indices, shape (N,): the true class of each datum (or, if `targeted`, the one to reach). Floating point:
        the values that a regression should return.
    norm : {"l1", "l2", "linf", "l0"}, or an order: 1, 2, inf, 0
        L0 counts changed entries.
    epsilon : float or Tensor, shape (N,)
        The radius, in the units of the data. One for all, or one per datum.
    bounds : (lower, upper), optional
        Numbers or tensors that broadcast to `data`, in the units of the data. An entry whose bounds are equal
        stays as it is. Default: none; images in [0, 1] may then leave [0, 1]: give `(0, 1)`.
    targeted : bool
        Bring the decision to `target` (the criterion down) instead of away from it.
    criterion : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a loss per datum, which is maximized: one of `rai_toolbox.perturbations.losses`, or your
        own. Default: for class indices, by how much another class's logit exceeds the true one's, in a run of its own
        for each of the nearest classes, nine at most (with fewer runs than classes, a rescaled cross-entropy); this
        means the same at any scale of the logits. Otherwise the squared error.
    margin : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a number per datum, positive where the decision counts as changed. Default: for class
        indices, that of a classifier, whose output has the shape (N, C), or (N,) or (N, 1) for two classes; otherwise
        there is no decision, and nothing stops early.
    steps : int
        Forward and backward passes of each run at most.
    restarts : int
        Runs: `steps` times `restarts` passes for a datum that withstands them all. A datum whose nearest error known
        is too far outside, or comes nearer too slowly, for the runs that are left to bring it within the radius is
        given up earlier: the more runs are allowed, the later.
    early_stop : bool
        Leave a datum alone as soon as its decision has changed. Otherwise go on to the largest criterion.
    samples : int
        For random models: the forward passes that each gradient is averaged, and each decision voted over.
    batch_size : int, optional
        Solve for so many data at a time. Default: all.
    generator : torch.Generator, optional
        One number is drawn from it. Default: always the same.
    callback : Callable[[int, Tensor], Any], optional
        Called after each run with its number and, shape (n,), which decisions of the batch have changed. If it returns
        True, the batch ends with what was found.

    Returns
    -------
    Solution
        Of all points that the model was asked about, the best: one where the decision has changed if there is one,
        else that of the largest criterion. `losses` and `success` come from one more pass over just these points.

    Raises
    ------
    TypeError
        Data that are not floating point; a model that does not return a tensor.
    ValueError
        An unknown norm; a negative epsilon; data outside the bounds; labels out of range; shapes that do not fit.

    Notes
    -----
    What is returned lies in the box exactly, and in the ball as measured in float64 from the stored values (up to the
    rounding of that measurement). A NaN loss never counts as found.

    Random numbers belong to a datum, not to its place in a batch: what is found for it does not depend on the other
    data, as far as the model's own arithmetic does not. (Matrix products may round differently in batches of different
    sizes; no decision counts that is not clear of this.)

    Where the first run meets gradients that are zero (a model that rounds its input, or a saturated output), two of
    three others are random searches [3]_, which need none.

    Runs that do not need each other's results are made side by side: where data have left a batch, their places are
    taken by further runs of those that are left.

    With runs enough for the classes, the first is Auto-PGD within the ball. The others are `minimum_norm`'s searches,
    which come from outside; the last walk starts from the nearest point known, if that is just outside. But in L0 three
    go to the nearest classes and three (L1: one) come from far outside; only where these come near the other classes
    follow (L1: none). In L1, where walks come no nearer than just outside, two runs are Auto-PGD within the ball. Of
    more than ten classes, the first nine runs are Auto-PGD within the ball, one for each of the nearest classes. With
    fewer runs, with a criterion of your own, or without `early_stop`, all are Auto-PGD within the ball (L1 and L0 still
    come from outside if they may stop).

    References
    ----------
    .. [1] F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
       attacks", ICML 2020.
    .. [2] F. Croce, M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021.
    .. [3] M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square attack: a query-efficient black-box adversarial
       attack via random search", ECCV 2020.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import worst_case
    >>> data, target = torch.tensor([[1.0, 0.0], [0.5, 0.1]]), torch.tensor([0, 0])
    >>> found = worst_case(torch.nn.Identity(), data, target, norm="linf", epsilon=0.3, bounds=(0, 1))
    >>> found.success
    tensor([False,  True])
    """
    shared = check_shared_arguments(
        model, data, target, norm=norm, bounds=bounds, targeted=targeted, criterion=criterion, margin=margin,
        samples=samples, batch_size=batch_size, generator=generator,
    )  # fmt: skip
    radii = as_epsilon(epsilon, len(shared.data), shared.data.device, shared.norm)
    positive_int("steps", steps)
    positive_int("restarts", restarts)
    with solving(model, criterion, shared.data.device, shared.seed):
        parts = [
            _solve(problem, radii[part], steps, restarts, early_stop, callback) for part, problem in batches(shared)
        ]
    return concatenate(parts)


def _solve(
    problem: Problem,
    radii: Tensor,
    steps: int,
    restarts: int,
    early_stop: bool,
    callback: Callable[[int, Tensor], Any] | None,
) -> Solution:
    stop = early_stop and problem.objective.achieved is not None
    best = Best(problem, by_score_alone=not stop)
    if len(problem.data):
        with contextlib.suppress(SolveEnded):
            _find(problem, best, radii, steps, restarts, stop, callback)
    return solution_at(problem, best.x)


def _find(
    problem: Problem, best: Best, radii: Tensor, steps: int, restarts: int, stop: bool,
    callback: Callable[[int, Tensor], Any] | None,
) -> None:  # fmt: skip
    score, achieved, output = ask_at_data(problem)
    best.update(torch.arange(len(problem.data), device=problem.data.device), problem.data, score, achieved)
    losses = ClassLosses.after(problem, output)
    # In L0 and L1 projections bend the path of an ascent: walks along the boundary are always worth it. In the other
    # norms they need more runs than classes, and a criterion that says on which side of the boundary a point lies.
    walks = problem.norm in ("l0", "l1") or (restarts > losses.count and problem.objective.criterion_decides)
    runs = _from_outside if stop and walks else _from_inside
    for number, parts in runs(problem, best, radii, losses, steps, restarts, stop, callback):
        if tell(callback, number, best.achieved.clone(), *parts):
            return


#: Yields after each run: its number, and what changes from run to run.
_Runs = Iterator[tuple[int, tuple[Part, ...]]]


def _from_inside(
    problem: Problem, best: Best, radii: Tensor, losses: ClassLosses, steps: int, restarts: int, stop: bool,
    callback: Callable[[int, Tensor], Any] | None,
) -> _Runs:  # fmt: skip
    """Auto-PGD within the ball, from the data and from random points."""
    every = torch.arange(len(problem.data), device=problem.data.device)
    ball, movable = problem.ball(radii), problem.movable()
    if restarts >= losses.count:
        rows = every[movable & ~best.achieved] if stop else every[movable]
        losses = _nearest_of_many(losses, rows, steps * restarts)
    for number in range(resume(callback, best), restarts):
        rows = every[movable & ~best.achieved] if stop else every[movable]
        if not len(rows):
            return
        loss = losses[number] if restarts >= losses.count else losses.all_classes
        _run_inside(problem, ball, best, rows, loss, number, steps, restarts, stop)
        yield number, (best,)


def _nearest_of_many(losses: ClassLosses, rows: Tensor, questions: int) -> ClassLosses:
    """Of more classes than have runs of their own, the nearest first, where that takes a tenth of the questions."""
    affordable = losses.count < losses.candidates() <= questions // 10
    return losses.nearest_first(rows, losses.problem.norm) if len(rows) and affordable else losses


def _run_inside(
    problem: Problem, ball: Ball, best: Best, rows: Tensor, losses: LossOfRows, number: int, steps: int, restarts: int,
    stop: bool,
) -> None:  # fmt: skip
    blind = best.blind[rows]
    if stop and number % 3 and bool(blind.any()):
        _at_random(problem, ball, best, rows[blind], steps, number, restarts)
        rows = rows[~blind]
    _run(problem, ball, best, rows, losses, number, steps, stop)
    if number == 0:
        best.blind = best.dead > _BLIND * steps


def _from_outside(
    problem: Problem, best: Best, radii: Tensor, losses: ClassLosses, steps: int, restarts: int, stop: bool,
    callback: Callable[[int, Tensor], Any] | None,
) -> _Runs:  # fmt: skip
    """Auto-PGD within the ball; then the searches of `minimum_norm`, for as long as they are promising.

    One run of Auto-PGD; of more classes than have runs of their own, as many as have.
    """
    every = torch.arange(len(problem.data), device=problem.data.device)
    ball, movable = problem.ball(radii), problem.movable()
    within = _Within(problem, best, radii)
    many = problem.norm in ("linf", "l2") and losses.candidates() > losses.count
    inside = losses.count if many else 1
    ranked = _nearest_of_many(losses, every[movable & ~best.achieved], steps * restarts) if many else losses
    left = max(1, restarts - inside)
    limit = None if problem.norm == "l0" else radii * _LIMIT[problem.norm]
    search = Search(problem, within, ranked, steps, left, limit=limit, done=lambda rows: best.achieved[rows])
    if ranked is not losses:
        search.count(every, losses.candidates())
    promising = Promising(problem.norm, within, radii, losses.count, left, tried=many, in_turn=left <= losses.count)
    parts = best, within, promising, *search.parts
    kept = resume(callback, *parts)
    for number in range(kept, inside):
        rows = every[movable & ~best.achieved]
        first = steps if many or restarts <= losses.count else max(1, steps // 2)
        loss = ranked[number] if many else losses.all_classes
        _run_inside(problem, ball, best, rows, loss, number, first, restarts, stop)
        yield number, parts
    if not many:
        search.rank(every[movable & ~best.achieved])
        if kept > inside:  # the state has been kept after `rank`, and counts what it asks
            resume(callback, *parts)
    blind, some_are_blind = best.blind, bool(best.blind.any())
    turn = inside
    for numbers in chain.from_iterable(map(search.together, promising.order())):
        first, turn = turn, turn + len(numbers)
        if first < kept:
            continue
        rows = every[movable & ~best.achieved & search.can_afford(numbers[0])]
        rows = promising.of(rows, numbers, search.spent, blind)
        if not len(rows):
            break
        if some_are_blind and bool(blind[rows].any()):
            _blindly(problem, ball, best, search, rows[blind[rows]], numbers, steps, first, restarts)
            rows = rows[~blind[rows]]
        if (inside_now := promising.within(rows, numbers, search.spent)) is not None:
            near, several, long = inside_now
            _run_several(problem, radii, best, rows[near], losses.any_class, first, several, long * steps)
            search.count(rows[near], several * long * steps)
            rows = rows[~near]
        if len(rows):
            search.run(rows, *numbers)
        for made in range(first, turn):
            yield made, parts
    rows = every[movable & ~best.achieved]
    near = within.distance[rows] <= torch.maximum(
        _NEAR[problem.norm] * radii[rows], radii[rows] + (problem.norm == "l0")
    )
    search.finish(rows[near])


def _blindly(
    problem: Problem, ball: Ball, best: Best, search: Search, rows: Tensor, numbers: Sequence[int], steps: int,
    first: int, restarts: int,
) -> None:  # fmt: skip
    """Two of three runs at random, for rows whose gradients say nothing."""
    for turn, number in enumerate(numbers, start=first):
        if turn % 3:
            _at_random(problem, ball, best, rows, steps, turn, restarts)
            search.count(rows, steps)
        else:
            search.run(rows, number)
        rows = rows[~best.achieved[rows] & search.can_afford(number)[rows]]


def _run_several(
    problem: Problem, radii: Tensor, best: Best, rows: Tensor, losses: LossOfRows, number: int, count: int, steps: int
) -> None:  # fmt: skip
    """So many runs of Auto-PGD within the ball for each row, side by side, until one has changed the decision."""
    for part in rows.split(max(1, len(problem.data) // count)):
        copies = Copies(problem, part, count)
        ball = copies.problem.ball(copies.gathered(radii))
        _run(copies.problem, ball, copies.best(best), copies.rows, losses, number, steps, True)


def _at_random(problem: Problem, ball: Ball, best: Best, rows: Tensor, steps: int, number: int, restarts: int) -> None:
    part = min(number / restarts, 1.0), min((number + 1) / restarts, 1.0)
    search_randomly(problem, ball, best, rows, queries=steps, stream=number * MOST_STEPS, progress=part)


class _Within(NearestFound):
    """Passes on to `best` the points within the radius that `minimum_norm`'s searches come by."""

    def __init__(self, problem: Problem, best: Best, radii: Tensor) -> None:
        super().__init__(problem)
        self._best = best
        self._radii = self.scored_within = radii
        self._of_last = radii, radii  # rows, and their radii
        self._no_score = radii.new_full((1,), -torch.inf)
        if problem.norm == "l0":
            # no point farther away is of interest
            self.distance = radii + 1

    def update(self, rows: Tensor, x: Tensor, score: Tensor, achieved: Tensor) -> Tensor:
        distance = super().update(rows, x, score, achieved)
        if self._of_last[0] is not rows:
            self._of_last = rows, self._radii[rows]
        outside = distance > self._of_last[1]
        if seen(lambda: bool(outside.all()), outside):
            return distance
        self._best.update(rows, x, torch.where(outside, self._no_score, score), achieved > outside)
        return distance


def _run(
    problem: Problem, ball: Ball, best: Found, rows: Tensor, losses: LossOfRows, number: int, steps: int, stop: bool
) -> None:
    stream = number * MOST_STEPS
    start = problem.data[rows]
    if number:
        start = ball[rows].random(lambda kind, part: getattr(problem.noise, kind)(rows[part], stream))
    if problem.norm != "l1":
        auto_pgd(problem, ball, best, rows, start, steps=steps, losses=losses, stop=stop, stream=stream)
        return
    # Begin in larger balls: steps within the L1 ball itself are short.
    nothing = Best(problem, by_score_alone=False)
    taken = 0
    for factor, part in ((3.0, int(0.3 * steps)), (2.0, int(0.3 * steps)), (1.0, steps - 2 * int(0.3 * steps))):
        wide = ball.with_epsilon(ball.epsilon * factor)
        start = auto_pgd(
            problem,
            wide,
            best if factor == 1.0 else nothing,
            rows,
            wide[rows].nearest(start),
            steps=part,
            losses=losses,
            stop=stop and factor == 1.0,
            stream=stream + taken,
        )
        taken += part
