"""The smallest perturbation that changes a decision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.perturbations._attack_losses import ClassLosses
from rai_toolbox.perturbations._ball import Norm
from rai_toolbox.perturbations._bounds import Bounds
from rai_toolbox.perturbations._nearest_found import NearestFound
from rai_toolbox.perturbations._problem import (
    MOST_STEPS,
    Problem,
    ask_at_data,
    batches,
    check_shared_arguments,
    positive_int,
    solution_at,
    solving,
)
from rai_toolbox.perturbations._query import Loss
from rai_toolbox.perturbations._resuming import SolveEnded, resume, tell
from rai_toolbox.perturbations._search import Search
from rai_toolbox.perturbations._solution import Solution, concatenate

_RANDOM_POINTS = 20


def minimum_norm(
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    *,
    norm: Norm,
    bounds: Bounds = None,
    targeted: bool = False,
    margin: Loss | None = None,
    steps: int = 50,
    restarts: int = 18,
    samples: int = 1,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Solution:
    """Find, for each datum, the smallest perturbation that changes the model's decision.

    The accuracy at every radius follows from one run: `Solution.robust_accuracy`.

    Parameters
    ----------
    model : Callable[[Tensor], Tensor]
        Differentiable. If an `nn.Module`, it is frozen and in eval mode during the solve, and put back after it.
    data : Tensor or array-like, shape (N, ...)
        Floating point, in any range.
    target : Tensor or array-like, shape (N,)
        The true class of each datum (or, if `targeted`, the one to reach). With a `margin`, whatever that takes.
    norm : {"l1", "l2", "linf", "l0"}, or an order: 1, 2, inf, 0
        L0 counts changed entries.
    bounds : (lower, upper), optional
        Numbers or tensors that broadcast to `data`, in the units of the data. An entry whose bounds are equal
        stays as it is. Default: none; images in [0, 1] may then leave [0, 1]: give `(0, 1)`.
    targeted : bool
        Look for the nearest point where the decision *is* `target`.
    margin : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a number per datum, positive where the decision counts as changed. For a regression,
        say, `lambda output, target: (output[:, 0] - target).abs() - 0.5`. Default: the margin of a classifier, whose
        output has the shape (N, C), or (N,) or (N, 1) for two classes.
    steps : int
        Forward and backward passes of each descent at most.
    restarts : int
        `steps` times `restarts` passes are what a datum's descents get, about a tenth more what follows them. Each of
        the other classes (the nine nearest by a linear model) gets a short one from the datum itself. The others start
        at random points far outside, in a ball that narrows, for any class or the ones that came nearest, and at the
        nearest point known. With the defaults, fewer than 1,000 forward and 1,000 backward passes per datum on average.
    samples : int
        For random models: the forward passes that each gradient is averaged, and each decision voted over.
    batch_size : int, optional
        Solve for so many data at a time. Default: all.
    generator : torch.Generator, optional
        One number is drawn from it. Default: always the same.
    callback : Callable[[int, Tensor], Any], optional
        Called after each descent with its number and the distances so far, shape (n,), of the data of the batch. If it
        returns True, the batch ends with what was found.

    Returns
    -------
    Solution
        Where no success was found (as for a datum with a NaN), `distances` is infinite, `success` False, and
        `perturbed` the datum itself. Where the decision was wrong from the start, the distance is 0.

    Raises
    ------
    TypeError
        Data that are not floating point; a model that does not return a tensor.
    ValueError
        An unknown norm; data outside the bounds; labels out of range; a floating point target without a margin;
        shapes that do not fit.

    Notes
    -----
    A point counts only if the decision there is clear of the rounding of a forward pass, so that it holds in a batch of
    any size. Random numbers belong to a datum, not to its place in a batch: what is found for it does not
    depend on the other data, as far as the model's own arithmetic does not.

    For L1, L2 and Linf the descents are in the spirit of FMN [1]_ and DDN [2]_, with exact projections on ball ∩ box;
    for L0, walks in L1 from far away, which end at few entries, then a greedy choice of entries [3]_, and exchanges of
    some entries for fewer others. Walks in L1 and L2 and exchanges take gradients at random points around too. What is
    found is brought nearer along the segment to the datum (L0: by putting back entries).

    References
    ----------
    .. [1] M. Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", NeurIPS 2021.
    .. [2] J. Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and
       defenses", CVPR 2019.
    .. [3] N. Papernot et al., "The limitations of deep learning in adversarial settings", EuroS&P 2016.

    Examples
    --------
    The nearest point where x > y does not hold, for a model that compares the two:

    >>> import torch
    >>> from rai_toolbox.perturbations import minimum_norm
    >>> data, target = torch.tensor([[1.0, 0.0], [0.5, 0.1]]), torch.tensor([0, 0])
    >>> found = minimum_norm(torch.nn.Identity(), data, target, norm="linf")
    >>> found.distances.numpy().round(2)
    array([0.5, 0.2])
    >>> found.robust_accuracy([0.1, 0.3, 0.6]).tolist()
    [1.0, 0.5, 0.0]
    """
    shared = check_shared_arguments(
        model, data, target, norm=norm, bounds=bounds, targeted=targeted, criterion=None, margin=margin,
        samples=samples, batch_size=batch_size, generator=generator,
    )  # fmt: skip
    if margin is None and shared.target.is_floating_point():
        raise ValueError(
            "target is floating point, so the model is no classifier: give a margin, a function of (output, target) "
            "that is positive where the output counts as wrong; or give class indices"
        )
    positive_int("steps", steps)
    positive_int("restarts", restarts)
    with solving(model, None, shared.data.device, shared.seed):
        return concatenate([_solve(problem, steps, restarts, callback) for _, problem in batches(shared)])


def _solve(problem: Problem, steps: int, restarts: int, callback: Callable[[int, Tensor], Any] | None) -> Solution:
    nearest = NearestFound(problem)
    if len(problem.data):
        with contextlib.suppress(SolveEnded):
            _find(problem, nearest, steps, restarts, callback)
    return solution_at(problem, nearest.x, nearest.distance.isinf())


def _find(
    problem: Problem, nearest: NearestFound, steps: int, restarts: int, callback: Callable[[int, Tensor], Any] | None
) -> None:
    every = torch.arange(len(problem.data), device=problem.data.device)
    score, achieved, output = ask_at_data(problem)
    nearest.update(every, problem.data, score, achieved)
    rows = every[~achieved & problem.movable()]
    losses = ClassLosses.after(problem, output)
    search = Search(problem, nearest, losses, steps, restarts)
    search.rank(rows)
    for number in count(resume(callback, nearest, *search.parts)):
        left = rows[search.can_afford(number)[rows]]
        if not len(left):
            break
        search.run(left, number)
        if tell(callback, number, nearest.distance.clone(), nearest, *search.parts):
            return
    nearest.scatter(rows, _RANDOM_POINTS, restarts * MOST_STEPS)
    search.finish(rows)
