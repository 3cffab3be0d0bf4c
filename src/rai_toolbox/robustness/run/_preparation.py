"""The start of an evaluation: model, data and settings put together, and tried."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rai_toolbox import evaluating
from rai_toolbox._version import __version__
from rai_toolbox.kernels._machine import own_generators
from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._imports import guarded
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.attack._settings import Settings, make_box
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.data._classes import with_classes
from rai_toolbox.robustness.data._maite import class_names_of
from rai_toolbox.robustness.data._samples import Summary, as_samples, by_position, summarize, targets_for
from rai_toolbox.robustness.models._load import Evaluated, Normalize
from rai_toolbox.robustness.models._maite import check_alike, held_module
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.run._earlier import digest_of, earlier_points
from rai_toolbox.robustness.session._journal import MODEL_OUTPUT

_GALLERY_POOL = 48
# How many samples a MAITE model and the module that it holds are both asked of.
_ASKED = 32


def prepare(
    model: Any,
    data: Any,
    settings: Settings,
    bounds: Any,
    mask: Any,
    preprocess: Any,
    output: str | None,
    classes: Any,
    device: torch.device | str | None,
    earlier: Mapping[str, Evaluation | str | Path],
) -> tuple[Subject, Summary]:
    if not callable(model):
        raise InputError(f"the model must be an nn.Module or a function of a batch, got {type(model).__name__}")
    samples = as_samples(data)
    if classes is not None:
        samples = with_classes(samples, classes)
    given, model = model, held_module(model)
    where = _device(model, device)
    targets = targets_for(samples, settings.task)
    summary = summarize(samples, settings.task)
    if isinstance(preprocess, Normalize):
        preprocess.check_range(summary.minimum, summary.maximum)
    box = make_box(samples, summary, bounds, mask)
    pool = np.linspace(0, len(samples) - 1, min(_GALLERY_POOL, len(samples))).round().astype(int)
    shown = range(len(samples)) if settings.keep_points else frozenset(pool.tolist())
    evaluated = Evaluated(model, preprocess, output)
    subject = Subject(evaluated, samples, targets, box, settings, where, shown)
    subject.earlier = earlier_points(subject, earlier)
    _try_model(subject)
    if given is not model:
        samples.class_names = _one_order(samples.class_names, class_names_of(given))
        with evaluating(*subject.modules):
            check_alike(given, evaluated, subject.batch(0, min(_ASKED, len(samples)))[0])
    return subject, summary


def _one_order(of_data: tuple[str, ...] | None, of_model: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the names of the classes; a MAITE model and its data must not have them in different orders."""
    if of_data is None or of_model is None or of_data == of_model:
        return of_data or of_model
    if sorted(of_data) == sorted(of_model):
        number = next(number for number, name in enumerate(of_data) if of_model[number] != name)
        raise InputError(
            f"class {number} is {of_data[number]!r} in the index2label of the data and {of_model[number]!r} in that of"
            " the model: they must number the classes alike"
        )
    return of_data


def _device(model: Any, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        return torch.device("cpu") if first is None else first.device
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {one_line(error)}") from None
    if where.type == "meta":
        raise InputError("device 'meta' cannot be used: its tensors hold no numbers")
    return where


def _try_model(subject: Subject) -> None:
    """See that the model takes a batch, that a gradient comes back, and that labels are among its classes."""
    x, _ = subject.batch(0, min(2, len(subject.samples)))
    with evaluating(*subject.modules):
        outputs = subject.model.outputs_for(x)
        with torch.enable_grad():
            message = "the model works without gradients, but with them it raised"
            depends = _with_a_gradient(subject, x, message)
    subject.has_gradient = depends
    if not depends and not subject.classifies:
        raise InputError(
            "no gradient reaches the model's input: it computes under torch.no_grad(), detaches, or leaves torch;"
            " without a gradient only classifiers are evaluated, by queries"
        )
    if not subject.classifies:
        if outputs != subject.targets.shape[1]:
            raise InputError(f"the model predicts {outputs} values per sample, y has {subject.targets.shape[1]}")
        return
    classes = max(2, outputs)
    highest = int(subject.targets.max())
    numbers = subject.samples.folder_numbers
    if highest >= classes and numbers and len(numbers) <= classes:
        # The model has no outputs of these numbers: they are names.
        subject.samples = by_position(subject.samples)
        subject.targets = targets_for(subject.samples, subject.settings.task)
        return
    if highest >= classes:
        index = int(np.argmax(subject.targets))
        raise InputError(
            f"the label of sample {index} is {highest}, but the model has {classes} classes: labels"
            f" must be 0 to {classes - 1}"
        )


def _with_a_gradient(subject: Subject, x: torch.Tensor, message: str) -> bool:
    """Say whether a gradient reaches the inputs; a model that cannot take inputs that ask for one has none."""
    leaf = x.clone().requires_grad_()

    def call() -> bool:
        try:
            return subject.model(leaf).requires_grad
        except RuntimeError as error:
            if "requires grad" in str(error) and "numpy" in str(error):
                subject.model.detached = True
                return subject.model(leaf).requires_grad
            raise

    return guarded(call, message)


def run_key(subject: Subject, summary: Summary) -> dict[str, Any]:
    """Return all that the figures depend on; a run is resumed only with the same key."""
    digest = hashlib.sha256()
    # A function has no state to compare, and the same weights may be used in another way.
    x, _ = subject.batch(0, min(2, len(subject.samples)))
    devices = own_generators(subject.device)
    with torch.random.fork_rng(devices=devices), evaluating(*subject.modules), torch.no_grad():
        torch.manual_seed(subject.settings.seed)
        output = guarded(lambda: subject.model(x), "the model raised")
    for name, tensor in subject.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            # One at a time: the host holds no second copy of the model.
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "data": summary.fingerprint,
        "model": digest.hexdigest()[:32],
        MODEL_OUTPUT: output.double().tolist(),
        "bounds": subject.box.to_dict(),
        **subject.settings.to_dict(),
        "also_try": digest_of(subject.earlier),
        "version": __version__,
        "torch": torch.__version__,
    }
