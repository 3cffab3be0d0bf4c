"""Names of classes in the order of a model's outputs, and labels by them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import did_you_mean, shortened
from rai_toolbox.robustness.data._samples import Samples

_LARGEST = 2**24
_FORMS = "one name a line in the order of the model's outputs; or .json, a list of them or an object of name and number"


def with_classes(samples: Samples, classes: str | Path | Sequence[str] | Mapping[str, int]) -> Samples:
    """Return the samples with labels that number the classes as the model does.

    samples: where their classes have names, each label becomes the number of its name; a name that is a number stands
        for itself. Where they have none, labels stay and get names.
    classes: the names in the order of the model's outputs, or their numbers.

    Raises InputError if the file cannot be read, or a class of the samples is not in it.
    """
    numbers = _numbers(_read(Path(classes)) if isinstance(classes, str | Path) else classes)
    names = [str(number) for number in range(max(numbers.values()) + 1)]
    for name, number in numbers.items():
        names[number] = name
    if samples.class_names is None:
        return dataclasses.replace(samples, class_names=tuple(names), folder_numbers=())
    found = [_number_of(name, numbers) for name in samples.class_names]
    targets = np.array(found)[np.asarray(samples.targets, dtype=np.int64)]
    return dataclasses.replace(samples, targets=targets, class_names=tuple(names))


def _number_of(name: str, numbers: Mapping[str, int]) -> int:
    if name in numbers:
        return numbers[name]
    if name.isdecimal() and len(name) < 10:
        return int(name)
    raise InputError(
        f"{arg('classes')} has no class {shortened(name)!r}, as the data have{did_you_mean(name, list(numbers))}"
    )


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{arg('classes')} {str(path)!r} is too long for a list of names; expected {_FORMS}")
        text = path.read_text("utf-8")
        if path.suffix.lower() == ".json":
            return json.loads(text)
    except OSError as error:
        raise InputError(f"{arg('classes')}: cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{arg('classes')} {str(path)!r} is not of its kind; expected {_FORMS}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbers(content: Any) -> dict[str, int]:
    """Return the number of each name."""
    if isinstance(content, Mapping) and all(str(key).isdecimal() for key in content):
        # The other way around, as the index of ImageNet is: {"0": ["n01440764", "tench"], ...}.
        pairs = [
            (str(name), int(number))
            for number, entry in content.items()
            for name in (entry if isinstance(entry, list) else [entry])
        ]
    elif isinstance(content, Mapping):
        pairs = [(str(name), number) for name, number in content.items()]
    elif isinstance(content, Sequence) and not isinstance(content, str):
        pairs = [(str(name), number) for number, name in enumerate(content)]
    else:
        pairs = []
    if not pairs or not all(type(number) is int and 0 <= number < 10**6 for _, number in pairs):
        raise InputError(f"{arg('classes')}: expected {_FORMS}")
    if len({name for name, _ in pairs}) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{arg('classes')} names {shortened(twice)!r} twice: each name stands for one class")
    return dict(pairs)
