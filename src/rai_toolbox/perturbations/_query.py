"""Evaluate the model at rows of a matrix: losses, decisions and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rai_toolbox.kernels._points import usable_gradients
from rai_toolbox.perturbations import losses as L

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The aim of a solve.

    `criterion` is reported as it is; `sign` times it is maximized. `achieved` tells where the decision has changed;
    `achieved_beyond_rounding` where it has by more than the rounding of a forward pass, which differs between batches
    of different sizes. Both are None if there is no decision. `default`: class indices, and no criterion or margin of
    the user's.
    """

    criterion: Loss
    sign: float
    achieved: Loss | None
    achieved_beyond_rounding: Loss | None
    default: bool
    criterion_decides: bool = True
    """Whether the criterion is positive just where the decision has changed."""
    rounding: Callable[[Tensor], Tensor | float] | None = None
    """If the criterion is the margin that decides: from an output to what it has to exceed for that to be firm."""

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        value = self.criterion(output, target)
        return value if self.sign > 0 else -value


def make_objective(target: Tensor, criterion: Loss | None, margin: Loss | None, targeted: bool) -> Objective:
    """Return the objective that `target` and the user's functions define."""
    sign = -1.0 if targeted else 1.0
    classifies = not target.is_floating_point()
    default = classifies and criterion is None and margin is None
    criterion_decides = criterion is None
    if criterion is None:
        criterion = margin if margin is not None else (L.margin if classifies else L.squared_error)
        # A user's margin is positive where the aim is achieved, whatever the aim.
        sign = 1.0 if margin is not None else sign
    if margin is not None:
        achieved = _positive(margin)
        rounding = (lambda _: 0.0) if criterion_decides else None
        return Objective(criterion, sign, achieved, achieved, default, criterion_decides, rounding)
    if not classifies:
        return Objective(criterion, sign, None, None, default, criterion_decides)
    achieved = L.reached if targeted else L.misclassified
    firmly = _clearly(L.targeted_margin if targeted else L.margin)
    rounding = _rounding if criterion_decides else None
    return Objective(criterion, sign, achieved, firmly, default, criterion_decides, rounding)


def _positive(margin: Loss) -> Loss:
    return lambda output, target: margin(output, target) > 0


def _clearly(margin: Loss) -> Loss:
    return lambda output, target: margin(output, target) > _rounding(output)


def _rounding(output: Tensor) -> Tensor:
    """By how much a logit may differ from one forward pass to another."""
    largest = torch.linalg.vector_norm(output.reshape(len(output), -1), ord=torch.inf, dim=1)
    return largest * (16 * torch.finfo(output.dtype).eps)


@dataclass
class Answer:
    """The model's values at n points. `grad` is the gradient of `loss`; NaN counts as -inf, and as no success.

    `dead`: where the gradient was zero.
    """

    loss: Tensor
    score: Tensor
    achieved: Tensor
    grad: Tensor
    dead: Tensor


class Query:
    """The model as a function of matrices: rows in, numbers per row out.

    shape: of one datum.
    samples: forward passes per question, averaged.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], shape: torch.Size, objective: Objective, samples: int
    ) -> None:
        self._model = model
        self._shape = shape
        self.objective = objective
        self._samples = samples
        self._ones: Tensor | None = None  # for the last loss: one for each of its rows

    def output(self, x: Tensor) -> Tensor:
        # A copy, not a leaf: a model may work in place on its input.
        output = self._model(x.reshape(len(x), *self._shape).clone())
        if not isinstance(output, Tensor):
            hint = ": give `lambda x: model(x).logits`" if hasattr(output, "logits") else ""
            raise TypeError(f"the model must return a tensor; it returned {type(output).__name__}{hint}")
        if not output.is_floating_point():
            raise TypeError(f"the model must return floating point logits or values; it returned {output.dtype}")
        if output.ndim == 0 or len(output) != len(x):
            raise ValueError(
                f"the model must return one row per datum: for an input of shape {(len(x), *self._shape)} it returned "
                f"{tuple(output.shape)}"
            )
        return output

    def _read(
        self, output: Tensor, target: Tensor, beyond_rounding: bool, score: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if score is None:
            score = per_row(self.objective.score(output, target), len(target), "criterion")
        if beyond_rounding and self.objective.rounding is not None:
            return score, score > self.objective.rounding(output)
        decide = self.objective.achieved_beyond_rounding if beyond_rounding else self.objective.achieved
        if decide is None:
            return score, torch.zeros_like(score, dtype=torch.bool)
        return score, per_row(decide(output, target), len(target), "margin") & ~score.isnan()

    @torch.no_grad()
    def evaluate(self, x: Tensor, target: Tensor, *, beyond_rounding: bool) -> tuple[Tensor, Tensor]:
        """The criterion and the decision at each row; the mean and the majority, if there are several samples."""
        losses = torch.zeros(len(x), device=x.device, dtype=torch.float64)
        votes = torch.zeros(len(x), device=x.device, dtype=torch.int64)
        dtype = torch.float32
        for _ in range(self._samples):
            score, achieved = self._read(self.output(x), target, beyond_rounding)
            losses += score.double() * self.objective.sign
            votes += achieved
            dtype = score.dtype
        return (losses / self._samples).to(dtype), 2 * votes > self._samples

    def ask(
        self,
        x: Tensor,
        target: Tensor,
        loss_fn: Loss,
        usable: Callable[[Tensor], tuple[Tensor, Tensor]] = usable_gradients,
    ) -> Answer:
        """Loss, score, decision and gradient at each row; `usable`: from gradients to better ones, and which were 0."""
        total: list[Tensor] = []
        for _ in range(self._samples):
            leaf = x.detach().requires_grad_()
            output = self.output(leaf)
            loss = per_row(loss_fn(output, target), len(x), "criterion")
            if not loss.requires_grad:
                raise ValueError("the loss does not depend differentiably on the input: no gradient reaches the data")
            if self._ones is None or (self._ones.shape, self._ones.dtype) != (loss.shape, loss.dtype):
                self._ones = torch.ones_like(loss.detach())
            (grad,) = torch.autograd.grad(loss, leaf, self._ones)
            with torch.no_grad():
                same = loss.detach() if loss_fn == self.objective.score else None
                score, achieved = self._read(output.detach(), target, True, same)
                part = [loss.detach(), score, achieved, grad]
                total = part if not total else [a + b for a, b in zip(total, part, strict=True)]
        loss, score, achieved, grad = total
        if self._samples > 1:
            loss, score, achieved = loss / self._samples, score / self._samples, 2 * achieved > self._samples
        grad, dead = usable(grad.contiguous())
        is_score, loss = score is loss, _nan_loses(loss)
        score = loss if is_score else _nan_loses(score)
        return Answer(loss=loss, score=score, achieved=achieved, grad=grad, dead=dead)


def _nan_loses(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def per_row(x: Tensor, n: int, name: str) -> Tensor:
    if x.shape != (n,):
        raise ValueError(f"{name} must return one number per datum, the shape ({n},); it returned {tuple(x.shape)}")
    return x
