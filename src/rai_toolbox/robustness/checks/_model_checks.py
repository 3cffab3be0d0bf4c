"""Checks of the model: does it answer the same question the same way, and does its gradient say anything?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from rai_toolbox.perturbations.losses import as_logits, cross_entropy, margin
from rai_toolbox.robustness.attack._grid import widest_radius
from rai_toolbox.robustness.checks._checks import Check, CheckContext, CheckResult, nothing
from rai_toolbox.robustness.data._samples import kind_of
from rai_toolbox.robustness.models._load import Normalize

_LOOKED_AT = 256
_MANY_OUTPUTS = 20
# Images that were normalized as for the training reach a few deviations.
_TOO_FAR, _TOO_NEAR = 20.0, 0.1


def _same_twice(context: CheckContext) -> CheckResult:
    x, _ = context.batch()
    if not len(x):
        return nothing()
    with torch.no_grad():
        outputs = torch.stack([context.subject.model(x) for _ in range(3)])
    difference = _relative_difference(outputs[1:], outputs[0])
    decisions = _changed_decisions(context, outputs)
    evidence = {
        "samples": len(x),
        "largest_relative_difference": difference,
        "share_of_decisions_that_differ": decisions,
    }
    draws = context.subject.settings.draws
    if difference > _tolerance(outputs) and draws > 1:
        return CheckResult(
            "warning",
            f"The model is random: {draws} answers vote on each decision, and a sample counts as right only where it is"
            " shown to be wrong less than half of the time. More draws narrow the intervals.",
            evidence | {"draws": draws},
        )
    if difference > _tolerance(outputs):
        return CheckResult(
            "distrust",
            f"The model answers the same input differently each time (by up to {difference:.2g} of the spread"
            " of its outputs).",
            evidence,
        )
    return CheckResult("ok", "The same input gets the same answer.", evidence)


def _same_alone(context: CheckContext) -> CheckResult:
    x, _ = context.batch(16)
    if len(x) < 2:
        return nothing()
    model = context.subject.model
    with torch.no_grad():
        first, again = model(x), model(x)
        if _relative_difference(again, first) > _tolerance(first):
            return CheckResult("not run", "The model is random, so that its answers differ anyway.")
        alone = torch.cat([model(row[None]) for row in x])
        reversed_order = model(x.flip(0)).flip(0)
    outputs = torch.stack([first, alone, reversed_order])
    difference = _relative_difference(outputs[1:], outputs[0])
    evidence = {
        "samples": len(x),
        "largest_relative_difference": difference,
        "share_of_decisions_that_differ": _changed_decisions(context, outputs),
    }
    if difference > _tolerance(outputs):
        return CheckResult(
            "distrust",
            f"A sample's answer depends on the other samples of its batch (by up to {difference:.2g} of the"
            " spread of the outputs).",
            evidence,
        )
    return CheckResult("ok", "A sample gets the same answer alone and in a batch.", evidence)


def _gradients(context: CheckContext) -> CheckResult:
    if not context.subject.has_gradient:
        queries = context.subject.settings.queries
        return CheckResult(
            "warning",
            f"No gradient reaches the model's input. It was searched by at most {queries} queries per sample and norm:"
            " the figures are an upper bound, and more queries can lower them.",
            {"queries": queries},
        )
    x, target = context.batch()
    if not len(x):
        return nothing()
    subject = context.subject

    def score(output: torch.Tensor) -> torch.Tensor:
        return margin(output, target) if subject.classifies else output.float().sum(dim=1)

    value, gradient = _gradient(subject.model, x, score)
    finite = gradient.isfinite().all(dim=1) & value.isfinite()
    length = torch.linalg.vector_norm(gradient.double(), dim=1)
    zero = finite & (length == 0)
    reach = widest_radius("l2", context.summary, subject.box, subject.samples.shape)
    # To first order the whole width of the data would have to be crossed a thousand times to change the answer.
    step = value.abs().double() if subject.classifies else _spread(value).double()
    vanishing = finite & ~zero & (step > 1000 * reach * length)
    shares = {
        name: float(part.double().mean())
        for name, part in (("zero", zero), ("vanishing", vanishing), ("not_finite", ~finite))
    }
    evidence = {"samples": len(x)} | {f"share_{name}": share for name, share in shares.items()}
    useless = sum(shares.values())
    if useless == 0:
        return CheckResult("ok", "Every sample tried has a gradient that is not zero.", evidence)
    message = ", ".join(f"{name.replace('_', ' ')} for {100 * share:.0f} %" for name, share in shares.items() if share)
    # A faint gradient still points somewhere, and the solvers take its direction alone: whether that is right is what
    # gradient-agreement measures.
    lost = shares["zero"] + shares["not_finite"]
    return CheckResult(
        "distrust" if lost >= 0.1 else "warning", f"The gradient is {message} of the samples tried.", evidence
    )


def _saturation(context: CheckContext) -> CheckResult:
    x, target = context.batch()
    if not len(x):
        return nothing()
    model = context.subject.model
    with torch.no_grad():
        output = model(x)
    logits = as_logits(output, target).float()
    # Of the cross-entropy at the logits: whether the model passes a gradient on is another question.
    loss, gradient = _gradient(lambda out: out, output, lambda out: cross_entropy(out.float(), target))
    silent = (loss == 0) | (gradient == 0).all(dim=1)
    gap = margin(logits, target).abs()
    largest = float(logits.abs().max())
    grain = float(np.finfo(np.float32).eps) * largest / max(float(gap.median()), 1e-30)
    rows = output.float()
    shares = output.shape[1] > 1 and bool((rows >= 0).all()) and bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all())
    evidence = {
        "samples": len(x),
        "share_whose_softmax_is_exactly_one": float(silent.double().mean()),
        "largest_logit": largest,
        "median_gap_between_logits": float(gap.median()),
        "returns_probabilities": shares,
    }
    if grain > 1e-3:
        return CheckResult(
            "distrust",
            f"The logits are so large beside their differences ({largest:.2g} beside"
            f" {float(gap.median()):.2g}) that float32 rounds these.",
            evidence,
        )
    if shares:
        return CheckResult(
            "warning",
            "The outputs are probabilities, not logits: where they reach 0 or 1 the gradient is gone.",
            evidence,
        )
    share = evidence["share_whose_softmax_is_exactly_one"]
    if share >= 0.1:
        return CheckResult(
            "warning",
            f"For {100 * share:.0f} % of the samples tried the float32 softmax is exactly 1: attacks on the"
            " cross-entropy find nothing there.",
            evidence,
        )
    return CheckResult("ok", "The logits are of a size that float32 and its softmax can tell apart.", evidence)


def _clean_performance(context: CheckContext) -> CheckResult:
    subject = context.subject
    if not subject.classifies:
        values = subject.targets[: len(context.clean)].astype(np.float64)
        guess = float(np.abs(values - np.median(values, axis=0)).mean())
        error = float(np.mean(context.clean))
        evidence = {"mean_absolute_error": error, "error_of_always_guessing_the_median": guess}
        if error >= guess:
            return CheckResult("warning", "The model predicts no better than always the same value would.", evidence)
        return CheckResult("ok", "The model predicts better than always the same value would.", evidence)
    labels = subject.targets[: len(context.clean)]
    accuracy = float(np.mean(context.clean))
    most_frequent = float(np.bincount(labels).max() / len(labels))
    evidence = {"accuracy": accuracy, "share_of_the_most_frequent_class": most_frequent}
    if accuracy == 0 or (len(np.unique(labels)) > 1 and accuracy <= most_frequent):
        return CheckResult(
            "warning",
            f"The model is no better than a constant answer: {accuracy:.1%} right, the most frequent class is"
            f" {most_frequent:.1%}. {_likely_mistake(context)}",
            evidence,
        )
    return CheckResult("ok", "The model is better than a constant answer.", evidence)


def _likely_mistake(context: CheckContext) -> str:
    """Return one sentence: what the predictions of some samples have in common, and the mistake that explains it."""
    subject = context.subject
    chosen = np.linspace(0, len(context.clean) - 1, min(_LOOKED_AT, len(context.clean))).round().astype(int)
    x, target = subject.subset(chosen.tolist())
    with torch.no_grad():
        logits = as_logits(subject.model(x), target)
    predicted, label, classes = logits.argmax(dim=1), target, logits.shape[1]
    _, times = ((predicted - label) % classes).unique(return_counts=True)
    shift = int(((predicted - label) % classes).mode().values)
    if shift and classes > 2 and int(times.max()) > 0.5 * len(label):
        off = f"+{shift}" if 2 * shift <= classes else f"-{classes - shift}"
        return f"Most predictions are label {off}: the labels begin at another number or are in another order."
    if len(label) > 1 and float((predicted == predicted.mode().values).double().mean()) > 0.9:
        return (
            f"It predicts class {int(predicted.mode().values)} nearly always: the preprocessing (range, mean and"
            " deviation, order of channels) is probably not that of the training."
        )
    return "The order of the labels, or the preprocessing (range, mean and deviation), is probably not the model's."


def _gradient(
    model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a score of each sample's outputs, and its gradient with respect to the sample, as rows."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        value = score(model(leaf))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient.flatten(1)


def _spread(value: torch.Tensor) -> torch.Tensor:
    return (value.max() - value.min()).expand_as(value)


def _relative_difference(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (outputs - reference).abs().nan_to_num(nan=torch.inf)
    # Where both are NaN, they agree.
    difference = torch.where(outputs.isnan() & reference.isnan(), 0.0, difference)
    spread = reference.nan_to_num().double()
    return float(difference.max() / max(1e-30, float(spread.max() - spread.min())))


def _tolerance(outputs: torch.Tensor) -> float:
    return max(1e-4, 100 * torch.finfo(outputs.dtype).eps)


def _changed_decisions(context: CheckContext, outputs: torch.Tensor) -> float:
    if not context.subject.classifies:
        return 0.0
    decided = (outputs[..., 0] > 0).long() if outputs.shape[-1] == 1 else outputs.argmax(dim=-1)
    return float((decided[1:] != decided[0]).any(dim=0).double().mean())


def _data_fit(context: CheckContext) -> CheckResult:
    subject, summary = context.subject, context.summary
    box = subject.box.to_dict()
    evidence: dict[str, Any] = {"smallest": summary.minimum, "largest": summary.maximum, "bounds": _named_box(box)}
    warned = []
    pictured = kind_of(subject.samples.shape, subject.samples.feature_names) == "image"
    if pictured and box["chosen"] == "from the data" and box["lower"] is None:
        warned.append(
            f"The images lie in [{summary.minimum:g}, {summary.maximum:g}] and not in [0, 1]: no bounds were applied,"
            " so that perturbed ones may be no images; give the bounds."
        )
    warned += _misread_units(context, pictured)
    if subject.classifies:
        x, _ = subject.batch(0, 1)
        with torch.no_grad():
            outputs = max(2, subject.model(x).shape[1])
        highest = int(subject.targets.max())
        evidence |= {"outputs": outputs, "largest_label": highest}
        if outputs >= _MANY_OUTPUTS and outputs >= 10 * (highest + 1):
            warned.append(
                f"The labels are 0 to {highest} before a model of {outputs} outputs: classes that have names are"
                " numbered in the order of the names, and may be others for the model; map them by classes."
            )
    if warned:
        return CheckResult("warning", " ".join(warned), evidence)
    return CheckResult("ok", f"Bounds of perturbed inputs: {evidence['bounds']}.", evidence)


def _misread_units(context: CheckContext, pictured: bool) -> list[str]:
    """Return what shows that a radius, or the statistics of the preprocessing, are not in the units of the data."""
    subject, summary = context.subject, context.summary
    said = []
    for norm in subject.settings.norms:
        widest = widest_radius(norm, summary, subject.box, subject.samples.shape)
        given = subject.settings.grid(norm)
        if given and min(given) > widest * (1 + 1e-6):
            said.append(
                f"Epsilon {min(given):g} ({norm}) turns any sample into any other, as {widest:g} does: it is in the"
                " units of the data, so of images in [0, 1] it is 8/255, not 8."
            )
    if pictured and isinstance(subject.model.preprocess, Normalize):
        low, high = subject.model.preprocess.range_of(summary.minimum, summary.maximum)
        if max(-low, high) > _TOO_FAR or high - low < _TOO_NEAR:
            said.append(
                f"Normalized, the images lie in [{low:.3g}, {high:.3g}]: the mean and deviation of the preprocessing"
                f" are not in the units of the data, which lie in [{summary.minimum:g}, {summary.maximum:g}]."
            )
    return said


def _named_box(box: Mapping[str, Any]) -> str:
    if box["lower"] is None and box["upper"] is None:
        return "none"
    if isinstance(box["lower"], list) or isinstance(box["upper"], list):
        return "one per feature"
    return f"[{box['lower']:g}, {box['upper']:g}]"


MODEL_CHECKS = (
    Check("data-fit", "Do the data fit the model?", _data_fit),
    Check("clean-performance", "Does the model do its task?", _clean_performance),
    Check("random-model", "Does the same input get the same answer each time?", _same_twice),
    Check("batch-dependence", "Is the answer to a sample independent of its batch?", _same_alone),
    Check("zero-gradients", "Are there gradients to follow?", _gradients),
    Check("saturation", "Can the outputs be told apart?", _saturation, classification_only=True),
)
