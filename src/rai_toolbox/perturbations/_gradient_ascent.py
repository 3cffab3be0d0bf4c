"""The projected-gradient loop around any optimizer and any perturbation model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rai_toolbox._freezing import evaluating, frozen
from rai_toolbox.kernels._points import is_time_to_look
from rai_toolbox.optim import independent_draws
from rai_toolbox.perturbations._bounds import Bounds, check_bounds
from rai_toolbox.perturbations._noise import draw_seed, seeded
from rai_toolbox.perturbations.models import AdditivePerturbation, PerturbationModel

Criterion = Callable[[Tensor, Tensor], Tensor]
_default_criterion = partial(cross_entropy, reduction="none")


def gradient_ascent(
    *,
    model: Callable[[Tensor], Tensor],
    data: Any,
    target: Any,
    optimizer: type[Optimizer] | Callable[..., Optimizer] | Optimizer,
    steps: int,
    perturbation_model: PerturbationModel | Callable[..., PerturbationModel] = AdditivePerturbation,
    targeted: bool = False,
    use_best: bool = False,
    criterion: Criterion | None = None,
    reduction_fn: Callable[[Tensor], Tensor] = torch.sum,
    bounds: Bounds = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    stop_when: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    **optim_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Change data so that a model's loss grows (or, targeted, shrinks), with an optimizer of your choice.

    The parameters of the perturbation model are optimized; the model that is attacked is frozen and in eval mode
    meanwhile, and everything is put back at the end, whatever happens.

    Parameters
    ----------
    model : Callable[[Tensor], Tensor]
        Differentiable. If an `nn.Module`, it is frozen and in eval mode during the solve.
    data : Tensor or array-like, shape (N, ...)
        Floating point.
    target : Tensor or array-like, shape (N, ...)
        What `criterion` takes beside the model's output; the classes to reach, if `targeted`.
    optimizer : type, partial or instance of Optimizer
        A type or partial is called with the perturbation model's parameters and `optim_kwargs`. An instance must
        already hold the parameters of a perturbation model instance.
    steps : int
    perturbation_model : type, partial or instance of PerturbationModel
        A type or partial is called with `data`. Default: `AdditivePerturbation`, started at zero.
    targeted : bool
        Minimize the loss instead of maximizing it.
    use_best : bool
        Return, per datum, the best of all iterates instead of the last one.
    criterion : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → a loss per datum, shape (N,). Default: cross-entropy.
    reduction_fn : Callable[[Tensor], Tensor]
        From the losses to the number that is differentiated. The default sum keeps data independent of each other.
    bounds : (lower, upper), optional
        Numbers or tensors that broadcast to `data`. After every step the perturbation is moved so that the perturbed
        data lie within them; the perturbation model must have a `constraint` (see `PerturbationModel`). Default: none;
        images in [0, 1] may then leave [0, 1]: give `(0, 1)`.
    samples : int
        For random models: the gradient of every step is the mean over this many forward passes.
    generator : torch.Generator, optional
        Makes a solve repeatable: what the start, a random model and the optimizer draw from torch's own random numbers
        follows from one number that is drawn from it, and those are untouched afterwards. An optimizer type or partial
        that takes a `generator`, and was not given one, gets this one. Default: all draw as they do elsewhere.
    stop_when : Callable[[Tensor, Tensor], Tensor], optional
        `(output, target)` → bool of shape (N,). A datum is returned as it was when this first held; when it has
        held for all, the solve ends; on a device it is looked every eighth step whether it has.
    callback : Callable[[int, Tensor, Tensor], Any], optional
        Called with the step (from 0), the perturbed data and their losses, before each step is taken.
    **optim_kwargs
        Passed to `optimizer`, which must then be a type or partial.

    Returns
    -------
    perturbed : Tensor, shape (N, ...)
        Detached.
    losses : Tensor
        `criterion` at `perturbed`, computed anew in a pass of its own; never negated.

    Raises
    ------
    TypeError
        `optimizer` or `perturbation_model` is something else; an optimizer instance without a perturbation model
        instance or together with `optim_kwargs`; `bounds` with a perturbation model that cannot obey them.
    ValueError
        `use_best` with a criterion that does not return a loss per datum; bounds that the data violate; steps < 0.

    Notes
    -----
    A model may work in place on its input: it gets a copy.

    Gradients that are NaN count as zero. Where the loss of an iterate is NaN, that iterate is never the best.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import gradient_ascent
    >>> model = torch.nn.Identity()
    >>> perturbed, losses = gradient_ascent(
    ...     model=model, data=[[1.0, 0.0]], target=[0], optimizer=torch.optim.SGD, lr=1.0, steps=1
    ... )
    >>> perturbed
    tensor([[0.7311, 0.2689]])
    """
    _check_count("steps", steps, least=0)
    _check_count("samples", samples, least=1)
    criterion = _default_criterion if criterion is None else criterion

    with ExitStack() as stack:
        stack.enter_context(_modes_of_its_own())
        data, target = _detached(data), _detached(target)
        if generator is not None:
            stack.enter_context(seeded(draw_seed(generator), data.device))
            if _wants_generator(optimizer):
                optim_kwargs["generator"] = generator
        pmodel, optim = _build(perturbation_model, optimizer, data, optim_kwargs)
        stack.enter_context(_frozen_modules(model, criterion))
        box = check_bounds(bounds, data)
        constrain = _constraint(pmodel, data, box)
        params = stack.enter_context(_optimized(pmodel))
        best = _Best(data.shape[0] if data.ndim else 0, targeted) if use_best or stop_when else None
        take_step = _step_of(optim)
        set_gradients = _Gradients(
            lambda: criterion(model(pmodel(data).clone()), target), params, reduction_fn, samples, targeted
        )
        for step in range(steps):
            perturbed = pmodel(data)
            output = model(perturbed.clone())
            losses = criterion(output, target)
            if best is not None:
                best.update(perturbed, losses, stop_when and stop_when(output.detach(), target), use_best)
                if stop_when and is_time_to_look(step, losses.detach()) and best.all_stopped():
                    break
            if callback is not None:
                callback(step, perturbed.detach(), losses.detach())
            set_gradients(losses)
            take_step()
            if constrain is not None:
                constrain()
        with torch.no_grad():
            last = _clamped(pmodel(data).detach(), box)
            if best is not None:
                output = model(last.clone())
                best.update(last, criterion(output, target), stop_when and stop_when(output, target), use_best)
                last = _clamped(best.perturbed, box)
            return last, criterion(model(last.clone()), target).detach()


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int ≥ {least}; got {value!r}")


@contextmanager
def _modes_of_its_own() -> Iterator[None]:
    """Gradients on, and random numbers of this rank's own: another may have more data, or none."""
    with torch.inference_mode(False), torch.enable_grad(), independent_draws():
        yield


@contextmanager
def _optimized(pmodel: Any) -> Iterator[list[Tensor]]:
    """The parameters to optimize; their gradients are put back at the end."""
    params = [p for p in pmodel.parameters() if p.requires_grad]
    before = [p.grad for p in params]
    try:
        yield params
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad


@contextmanager
def _frozen_modules(model: Any, criterion: Any) -> Iterator[None]:
    """Freeze the model and the criterion where they are modules; the model is in eval mode too."""
    if not callable(model):
        raise TypeError(f"model must be callable; got {type(model).__name__}")
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
            stack.enter_context(frozen(model))
        if isinstance(criterion, nn.Module):
            stack.enter_context(frozen(criterion))
        yield


def _clamped(perturbed: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    """Clamp to the box: data + (upper - data) may round to more than upper."""
    return perturbed if box is None else perturbed.clamp(*box)


class _Gradients:
    """Set the gradient of each parameter, of losses or of the mean over several samples of them.

    losses: draws another sample.
    reduction_fn: from the losses to the number that is differentiated.
    targeted: whether the losses are to shrink; else to grow: optimizers descend, so the gradient gets a minus.
    """

    def __init__(
        self, losses: Callable[[], Tensor], params: list[Tensor], reduction_fn: Callable[[Tensor], Tensor],
        samples: int, targeted: bool,
    ) -> None:  # fmt: skip
        self._losses, self._params, self._samples = losses, params, samples
        self._sign = 1.0 if targeted else -1.0
        # The gradient of a sum is the losses' own, with ones for a seed: no need to form the sum.
        self._reduce = None if reduction_fn is torch.sum else reduction_fn
        self._seed: Tensor | None = None

    def __call__(self, losses: Tensor) -> None:
        sums = self._of(losses)
        for _ in range(self._samples - 1):
            for i, grad in enumerate(self._of(self._losses())):
                so_far = sums[i]
                sums[i] = grad if so_far is None or grad is None else so_far + grad
        for param, grad in zip(self._params, sums, strict=True):
            # A copy: autograd may return an expanded view, and optimizers transform gradients in place.
            param.grad = None if grad is None else grad.nan_to_num(nan=0.0)

    def _of(self, losses: Tensor) -> list[Tensor | None]:
        total = losses if self._reduce is None else self._reduce(losses)
        if self._seed is None:
            # Sign and mean go in once, with the seed of the backward pass.
            self._seed = torch.full_like(total, self._sign / self._samples)
        return list(torch.autograd.grad(total, self._params, self._seed, allow_unused=True))


class _Best:
    """Per datum, the best iterate so far, or the iterate at which the datum stopped."""

    def __init__(self, n: int, targeted: bool) -> None:
        self._n = n
        self._sign = -1.0 if targeted else 1.0
        self._perturbed: Tensor | None = None

    @property
    def perturbed(self) -> Tensor:
        assert self._perturbed is not None
        return self._perturbed

    @torch.no_grad()
    def update(self, perturbed: Tensor, losses: Tensor, stop: Tensor | None, use_best: bool) -> None:
        if losses.shape != (self._n,):
            raise ValueError(
                "use_best and stop_when need a loss per datum: criterion must return the shape "
                f"({self._n},); it returned {tuple(losses.shape)} for an input of shape {tuple(perturbed.shape)}"
            )
        score = (losses.detach() * self._sign).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self._perturbed is None:
            self._perturbed, self._score = perturbed.detach().clone(), score
            self._stopped = torch.zeros_like(score, dtype=torch.bool) if stop is None else stop
            return
        better = score > self._score if use_best else torch.ones_like(self._stopped)
        if stop is not None:
            better = (better | stop) & ~self._stopped
            self._stopped = self._stopped | stop
        self._score = torch.where(better, score, self._score)
        rows = better.view(-1, *(1,) * (perturbed.ndim - 1))
        self._perturbed = torch.where(rows, perturbed.detach(), self._perturbed)

    def all_stopped(self) -> bool:
        return bool(self._stopped.all())


def _detached(x: Any) -> Tensor:
    # as_tensor would move a tensor to the default device
    x = (x if isinstance(x, Tensor) else torch.as_tensor(x)).detach()
    return x.clone() if x.is_inference() else x


def _argument(optimizer: Any, name: str) -> inspect.Parameter | None:
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        return None
    try:
        return inspect.signature(optimizer).parameters.get(name)
    except (TypeError, ValueError):  # it does not tell
        return None


def _wants_generator(optimizer: Any) -> bool:
    """Whether an optimizer's type or partial takes a generator, and the user has chosen none."""
    argument = _argument(optimizer, "generator")
    return argument is not None and argument.default in (argument.empty, None, torch.default_generator)


def _step_of(optim: Optimizer) -> Callable[[], object]:
    """`optim.step` without torch's wrapper for hooks and profilers, where there are none.

    On a linear model that is a tenth of a solve.
    """
    step = type(optim).step
    if (
        not getattr(step, "hooked", False)
        or "step" in vars(optim)  # patched, by a scheduler say
        or optim._optimizer_step_pre_hooks
        or optim._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    ):
        return optim.step
    return partial(step.__wrapped__, optim)  # pyright: ignore[reportFunctionMemberAccess]


def _build(
    perturbation_model: Any, optimizer: Any, data: Tensor, optim_kwargs: dict[str, Any]
) -> tuple[Any, Optimizer]:
    given = isinstance(perturbation_model, PerturbationModel) and not isinstance(perturbation_model, type)
    if given:
        pmodel = perturbation_model
    elif callable(perturbation_model):
        pmodel = perturbation_model(data)
        if not isinstance(pmodel, PerturbationModel):
            raise TypeError(
                "perturbation_model must make an object that has parameters() and is callable on data; "
                f"{perturbation_model!r} made a {type(pmodel).__name__}"
            )
    else:
        raise TypeError(
            "perturbation_model must be a PerturbationModel (something with parameters() that is callable on data), "
            f"or a type or function that makes one from data; got {type(perturbation_model).__name__}"
        )
    if isinstance(optimizer, Optimizer):
        if not given:
            raise TypeError(
                "an optimizer instance holds the parameters of a perturbation model, so perturbation_model must be "
                "that instance; or give the optimizer as a type or partial"
            )
        if optim_kwargs:
            raise TypeError(f"the optimizer is an instance: it cannot take {sorted(optim_kwargs)} any more")
        return pmodel, optimizer
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be a type, partial or instance of torch.optim.Optimizer; got {type(optimizer).__name__}"
        )
    params = _argument(optimizer, "params")
    if params is not None and params.kind is params.KEYWORD_ONLY:  # those of a chain come after its links
        optim = optimizer(params=pmodel.parameters(), **optim_kwargs)
    else:
        optim = optimizer(pmodel.parameters(), **optim_kwargs)
    if not isinstance(optim, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer; {optimizer!r} made a {type(optim).__name__}")
    return pmodel, optim


def _constraint(pmodel: Any, data: Tensor, box: tuple[Tensor, Tensor] | None) -> Callable[[], object] | None:
    if box is None:
        return None
    if not hasattr(pmodel, "constraint"):
        raise TypeError(
            f"bounds need a perturbation model with a method constraint(data, lower, upper); {type(pmodel).__name__} "
            "has none"
        )
    with torch.no_grad():
        constrain = torch.no_grad()(pmodel.constraint(data, *box))
        constrain()
    return constrain
