"""Corruptions that the user gives: functions of a batch of inputs and a severity."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._imports import guarded, import_named, names_function
from rai_toolbox.robustness.attack._average import error_at
from rai_toolbox.robustness.attack._subject import Subject

#: From a batch of inputs and a severity to the corrupted inputs.
Corrupts: TypeAlias = Callable[[Tensor, float], Any]


def as_corruptions(corruptions: Mapping[str, Corrupts] | Sequence[Corrupts] | None) -> dict[str, Corrupts]:
    """Return corruptions by their names.

    Raises InputError if one is no function, or two have the same name.
    """
    if corruptions is None:
        return {}
    if isinstance(corruptions, Mapping):
        named = [(str(name), function) for name, function in corruptions.items()]
    else:
        listed = [corruptions] if callable(corruptions) else list(corruptions)
        named = [(getattr(function, "__name__", type(function).__name__), function) for function in listed]
    for position, (name, function) in enumerate(named):
        if not callable(function):
            raise InputError(f"{arg('corruptions')}: {name} is {type(function).__name__}, expected a function")
        if name in (other for other, _ in named[:position]):
            raise InputError(f"{arg('corruptions')}: two have the name {name!r}; give each a name of its own")
    return dict(named)


def load_corruptions(specs: Sequence[str]) -> dict[str, Corrupts]:
    """Return the corruptions that ``file.py:function`` or ``package.module:function`` name, by the function's name.

    Raises InputError if there is no such function; or as `as_corruptions`.
    """
    what = arg("corruptions")
    for spec in specs:
        if not names_function(spec):
            raise InputError(f"{what} {spec!r}: expected file.py:function of a batch and a severity")
    names = [spec.rpartition(":")[2] for spec in specs]
    # The file's name too, where two files have a function of the same name.
    called = [spec if names.count(name) > 1 else name for spec, name in zip(specs, names, strict=True)]
    return as_corruptions({name: import_named(spec, what) for name, spec in zip(called, specs, strict=True)})


def corrupted(subject: Subject, name: str, batch: int, severities: Sequence[float]) -> dict[str, Any]:
    """Return the model's errors on a batch under a corruption, shape (severities, samples).

    Raises InputError if the corruption raises or returns something else than inputs.
    """
    begun = time.perf_counter()
    x, target = subject.batch(*subject.span(batch))
    error = np.zeros((len(severities), len(x)))
    for level, severity in enumerate(severities):
        seed = subject.generator("corruption", name, level, batch).initial_seed()
        with _seeded(seed), torch.no_grad():
            changed = _corrupt(subject.corruptions[name], name, x, severity)
        error[level], _ = error_at(subject, changed, target)
    return {"error": error, "seconds": time.perf_counter() - begun}


def _corrupt(function: Callable[[Tensor, float], Any], name: str, x: Tensor, severity: float) -> Tensor:
    what = f"{arg('corruptions')}: {name} at severity {severity:g}"
    changed = guarded(lambda: torch.as_tensor(function(x.clone(), severity)), f"{what} raised")
    if changed.shape != x.shape:
        raise InputError(
            f"{what} returned shape {tuple(changed.shape)}, expected that of the batch it was given, {tuple(x.shape)}"
        )
    changed = changed.to(x)
    if not bool(changed.isfinite().all()):
        raise InputError(f"{what} returned a NaN or an infinite value")
    return changed


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The random numbers of Python and numpy, which corruptions use too; those of torch belong to the stage."""
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)  # noqa: NPY002
