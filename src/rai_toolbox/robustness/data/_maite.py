"""Datasets of MAITE's protocol for image classification: (input, target, metadata) by index, and metadata of their own.

The protocol is a matter of shape: nothing of MAITE is imported to read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError

_MOST_CLASSES = 10**6


def is_of_maite(thing: Any) -> bool:
    """Say whether a dataset or a model has the metadata that MAITE's protocols ask of every component."""
    metadata = getattr(thing, "metadata", None)
    return isinstance(metadata, Mapping) and isinstance(metadata.get("id"), str)


def class_names_of(thing: Any) -> tuple[str, ...] | None:
    """Return the names of the classes in the order of their numbers; None where there are none.

    Raises InputError if ``index2label`` has keys that are no class numbers.
    """
    names = thing.metadata.get("index2label")
    if not names:
        return None
    numbers = [number for number in names if isinstance(number, (int, np.integer)) and 0 <= number < _MOST_CLASSES]
    if len(numbers) < len(names):
        strange = next(number for number in names if number not in numbers)
        raise InputError(f"index2label of {thing.metadata['id']!r} has {strange!r}, expected class numbers from 0")
    return tuple(str(names.get(number, number)) for number in range(max(numbers) + 1))


def triples(dataset: Any, what: str) -> Iterator[tuple[NDArray, int, int | str]]:
    """Yield the input, the label and the id of each sample.

    Raises InputError if one of them is of another form.
    """
    for index in range(len(dataset)):
        item = dataset[index]
        if not (isinstance(item, tuple) and len(item) == 3 and isinstance(item[2], Mapping) and "id" in item[2]):
            raise InputError(f"{what}: sample {index} of a MAITE dataset must be (input, target, metadata with an id)")
        name = item[2]["id"]
        if not isinstance(name, (int, str)):
            raise InputError(f"{what}: the id of sample {index} is {type(name).__name__}, expected an int or a str")
        yield np.asarray(item[0]), label_of(item[1], f"{what}: the target of sample {index}"), name


def label_of(target: Any, what: str) -> int:
    """Return the class of a target: one-hot, or a score for each class, shape (classes,).

    Raises InputError if it is of another shape, or no class has the largest score alone.
    """
    scores = np.asarray(target)
    if scores.dtype.kind not in "biuf" or scores.ndim != 1 or len(scores) < 2:
        shape = f"shape {scores.shape} and dtype {scores.dtype}"
        raise InputError(f"{what} has {shape}, expected numbers of shape (classes,), as of image classification")
    best = np.flatnonzero(scores == scores.max())
    if len(best) != 1:
        raise InputError(f"{what} has no largest entry of its own: it must name one class")
    return int(best[0])
