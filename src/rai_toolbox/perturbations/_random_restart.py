"""The best of several runs of a solver."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.optim import Optimizer

P = ParamSpec("P")


def random_restart(solver: Callable[P, tuple[Tensor, Tensor]], repeats: int) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return a solver that runs `solver` several times and keeps the best result of each datum.

    Parameters
    ----------
    solver : Callable[..., (Tensor, Tensor)]
        Returns perturbed data, shape (N, ...), and losses, one per datum: shape (N,), (N, 1), ... A single loss, of
        shape (1,), (1, 1), ..., is that of the whole batch. A partial of a solver is fine.
    repeats : int

    Returns
    -------
    Callable[..., (Tensor, Tensor)]
        Takes what `solver` takes. The best is the largest loss, or the smallest where the solver's `targeted` holds,
        be it an argument, frozen in a partial, or the default. A NaN loss never wins. The losses keep their shape.

    Raises
    ------
    ValueError
        `repeats` < 1.
        When called: the losses are not one per datum.
    TypeError
        `solver` cannot be called, or `repeats` is not an int.

    Notes
    -----
    Every run starts anew: a perturbation model that is an instance is initialized again before each run (by its
    `reset_parameters()`, else from the parameters that it came with), an optimizer instance gets back the state that
    it came with. Restarts help if the initialization is random: `partial(AdditivePerturbation, init_fn=...)`.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from rai_toolbox.perturbations import AdditivePerturbation, gradient_ascent, random_restart
    >>> noise = partial(AdditivePerturbation, init_fn=torch.nn.init.normal_)
    >>> solver = random_restart(gradient_ascent, repeats=3)
    >>> x, losses = solver(
    ...     model=torch.nn.Identity(), data=torch.zeros(2, 3), target=torch.tensor([0, 1]),
    ...     optimizer=torch.optim.SGD, lr=0.1, steps=2, perturbation_model=noise,
    ... )
    >>> x.shape, losses.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """
    if not callable(solver):
        raise TypeError(f"solver must be callable; got {type(solver).__name__}")
    if isinstance(repeats, bool) or not isinstance(repeats, int):
        raise TypeError(f"repeats must be an int; got {repeats!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be ≥ 1; got {repeats}")

    def restarted(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor]:
        targeted = _targeted(solver, args, kwargs)
        start_anew = _reset_instances(solver, kwargs)
        perturbed, losses = solver(*args, **kwargs)
        for _ in range(repeats - 1):
            start_anew()
            new_perturbed, new_losses = solver(*args, **kwargs)
            _check_losses(new_losses, new_perturbed)
            better = (new_losses < losses) if targeted else (new_losses > losses)
            better |= losses.isnan() & ~new_losses.isnan()
            losses = torch.where(better, new_losses, losses)
            rows = better.view(-1, *(1,) * (perturbed.ndim - 1))
            perturbed = torch.where(rows, new_perturbed, perturbed)
        return perturbed, losses

    try:
        return wraps(solver)(restarted)
    except (AttributeError, TypeError):
        return restarted


def _check_losses(losses: Tensor, perturbed: Tensor) -> None:
    per_datum = losses.ndim >= 1 and losses.numel() == len(losses) and len(losses) in (1, len(perturbed))
    if not per_datum:
        raise ValueError(
            "random_restart compares the losses of each datum: the solver must return losses of shape (N,) or (N, 1) "
            f"for perturbed data of shape (N, ...); it returned losses of shape {tuple(losses.shape)} for data of "
            f"shape {tuple(perturbed.shape)}"
        )


def _frozen_keywords(solver: Any) -> dict[str, Any]:
    return {**_frozen_keywords(solver.func), **solver.keywords} if isinstance(solver, partial) else {}


def _targeted(solver: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        bound = inspect.signature(solver).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):  # no signature to be had, or arguments that the solver itself will refuse
        return bool(kwargs.get("targeted", _frozen_keywords(solver).get("targeted", False)))
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return bool(arguments.get("targeted", False))


def _reset_instances(solver: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[], None]:
    """Return a function that resets the instances of a perturbation model and an optimizer."""
    given = {**_frozen_keywords(solver), **kwargs}
    pmodel: Any = given.get("perturbation_model")
    optimizer: Any = given.get("optimizer")
    resets: list[Callable[[], Any]] = []
    if hasattr(pmodel, "parameters") and not isinstance(pmodel, type):
        if hasattr(pmodel, "reset_parameters"):
            resets.append(pmodel.reset_parameters)
        else:
            starts = [(p, p.detach().clone()) for p in pmodel.parameters()]
            resets.append(partial(_copy_back, starts))
    if isinstance(optimizer, Optimizer):
        state = copy.deepcopy(optimizer.state_dict())
        resets.append(lambda: optimizer.load_state_dict(copy.deepcopy(state)))

    def start_anew() -> None:
        for reset in resets:
            reset()

    return start_anew


@torch.no_grad()
def _copy_back(starts: list[tuple[Tensor, Tensor]]) -> None:
    for param, start in starts:
        param.copy_(start)
