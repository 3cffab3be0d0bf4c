"""One perturbation for a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.kernels._points import distances, signs_of_largest
from rai_toolbox.perturbations import losses as L
from rai_toolbox.perturbations._ball import Ball, Norm, check_norm
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import draw_seed
from rai_toolbox.perturbations._problem import as_data, as_epsilon, as_target, positive_int, solving
from rai_toolbox.perturbations._query import Loss, Objective, Query, make_objective
from rai_toolbox.perturbations._solution import UniversalSolution


def universal(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    *,
    norm: Norm,
    epsilon: float,
    bounds: Bounds = None,
    targeted: bool = False,
    criterion: Loss | None = None,
    margin: Loss | None = None,
    epochs: int = 10,
    samples: int = 1,
    generator: torch.Generator | None = None,
    callback: Callable[[int, UniversalSolution], Any] | None = None,
) -> UniversalSolution:
    """Find one perturbation that, added to any datum, changes as many decisions as it can.

    Projected gradient ascent on the mean loss over batches, with steps that shrink from epoch to epoch. After each
    epoch the perturbation is tried on all data, and the best is returned.

    Parameters
    ----------
    model : Callable[[Tensor], Tensor]
        As for `worst_case`.
    loader : iterable of (data, target)
        A `DataLoader`, or a list of batches: anything that can be gone through more than once.
    norm : {"linf", "l2", "l1", "l0"}, or an order: inf, 2, 1, 0
    epsilon : float
        The radius of the perturbation.
    bounds : (lower, upper), optional
        Numbers, or tensors of the shape of one datum. `data + delta` is clipped to them wherever it is used; the
        gradient is taken at the clipped point, and passes the clip as if it were not there. Default: none; images in
        [0, 1] may then leave [0, 1].
    targeted : bool
        Move the decisions to `target` instead of away from it.
    criterion : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a loss per datum. Default: for class indices, a smooth form of the error, between 0 and 1,
        so that neither data that are wrong already nor those that never will be drown the others; else the squared
        error.
    margin : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a number per datum, positive where the decision has changed.
    epochs : int
        How often to go through the loader with steps; each has a second pass that only measures.
    samples : int
        For random models: the forward passes that each gradient and decision is averaged over.
    generator : torch.Generator, optional
        One number is drawn from it. Default: always the same.
    callback : Callable[[int, UniversalSolution], Any], optional
        Called after each epoch with what it found.

    Returns
    -------
    UniversalSolution

    Raises
    ------
    TypeError, ValueError
        As `worst_case`; and where the loader is empty.

    References
    ----------
    .. [1] S.-M. Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017.
    .. [2] A. Shafahi et al., "Universal adversarial training", AAAI 2020.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import universal
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.eye(2))
    >>> batches = [(torch.tensor([[1.0, 0.0], [1.0, 0.5]]), torch.tensor([0, 0]))]
    >>> found = universal(model, batches, norm="linf", epsilon=0.6)
    >>> found.delta, found.success_rate
    (tensor([-0.6000,  0.6000]), 1.0)
    """
    name = check_norm(norm)
    positive_int("epochs", epochs)
    positive_int("samples", samples)
    seed = draw_seed(generator)
    best: tuple[tuple[float, float], UniversalSolution] | None = None
    data, target = _first_batch(loader)
    run = _Run(model, data, target, name, epsilon, bounds, targeted, criterion, margin, samples)
    with solving(model, criterion, run.device, seed):
        for epoch in range(epochs + 1):
            if epoch and run.delta.shape[1]:  # data without entries cannot change
                run.ascend(loader, 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs)))
            found = run.measure(loader)
            key = (found.success_rate, run.objective.sign * found.loss)
            if not math.isnan(key[1]) and (best is None or key > best[0]):
                best = (key, found)
            if callback is not None:
                callback(epoch, found)
    if best is None:
        raise ValueError("the loss is NaN on the data as they are: nothing can be said about perturbations of them")
    return best[1]


def _soft_error(output: Tensor, target: Tensor) -> Tensor:
    """The error, 0 or 1, smoothed by the margin in units of the spread of the logits."""
    logits = L.as_logits(output, target)
    low, high = logits.detach().aminmax(dim=1)
    return torch.sigmoid(8 * L.margin(logits, target) / (high - low).clamp_min(torch.finfo(logits.dtype).tiny))


def _first_batch(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    # A loader that shuffles must not take this from the user's random numbers.
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
        if iterator is loader:
            raise TypeError("loader must be something that can be gone through more than once, not an iterator")
        for batch in iterator:
            data, target = _pair(batch)
            if len(data):
                return data, target
    raise ValueError("the loader is empty: it must yield at least one batch (data, target) with data in it")


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that hold data."""
    for batch in loader:
        data, target = _pair(batch)
        if len(data):
            yield data, target


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    try:
        data, target = batch
    except (TypeError, ValueError):
        raise TypeError(f"the loader must yield pairs (data, target); it yielded a {type(batch).__name__}") from None
    data = as_data(data)
    return data, as_target(target, data)


class _Run:
    """The perturbation, and how it is moved and measured."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        data: Tensor,
        target: Tensor,
        norm: str,
        epsilon: float,
        bounds: Bounds,
        targeted: bool,
        criterion: Loss | None,
        margin: Loss | None,
        samples: int,
    ) -> None:
        if not target.is_floating_point() and criterion is None:
            criterion = _soft_error
        self.objective: Objective = make_objective(target, criterion, margin, targeted)
        self.device = data.device
        self._shape = data.shape[1:]
        self._norm = norm
        self._bounds = bounds
        self._query = Query(model, data.shape[1:], self.objective, samples)
        zero = torch.zeros(1, self._shape.numel(), dtype=data.dtype, device=data.device)
        radius = as_epsilon(epsilon, 1, data.device, norm)[:, None]
        self._width = data.abs().amax() if data.numel() else data.new_zeros(())
        self._ball = Ball(norm, zero, radius, None, None)
        self.delta = zero

    def _perturbed(self, data: Tensor) -> Tensor:
        matrix = data.reshape(len(data), -1) + self.delta
        box = check_bounds(self._bounds, data)
        if box is None:
            return matrix
        return matrix.reshape(data.shape).clamp(*box).reshape(matrix.shape)

    def ascend(self, loader: Iterable[Any], shrink: float) -> None:
        for data, target in _batches(loader):
            answer = self._query.ask(self._perturbed(data), target, self.objective.score)
            grad = answer.grad.mean(dim=0, keepdim=True)
            epsilon = self._ball.epsilon.to(grad.dtype)
            size = shrink + 0.01
            if self._norm == "l1":
                count = torch.tensor([max(1, round(0.1 * grad.shape[1]))], device=grad.device)
                move = signs_of_largest(grad, count) * epsilon
            elif self._norm == "l0":
                move = self._ball.steepest(grad) * epsilon.sqrt() * self._width
            else:
                move = self._ball.steepest(grad) * epsilon
            self.delta = self._ball.land(self._ball.project_(self._ball.delta(self.delta) + size * move))

    def measure(self, loader: Iterable[Any]) -> UniversalSolution:
        total, changed, count = 0.0, 0, 0
        for data, target in _batches(loader):
            losses, achieved = self._query.evaluate(self._perturbed(data), target, beyond_rounding=False)
            total += losses.double().sum().item()
            changed += int(achieved.sum())
            count += len(data)
        return UniversalSolution(
            delta=self.delta[0].reshape(self._shape),
            success_rate=changed / count,
            loss=total / count,
            distance=distances(self.delta, torch.zeros_like(self.delta), self._norm).item(),
        )
