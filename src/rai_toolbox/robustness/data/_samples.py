"""The samples of an evaluation: conversion, checks and a summary."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._results import Task
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.data._maite import class_names_of, is_of_maite, triples
from rai_toolbox.robustness.data._pixels import PixelReader, is_picture
from rai_toolbox.robustness.data._rows import ArrayRows, Rows, Spool, as_bytes

Kind = Literal["image", "series", "table"]

# The entries of an item that is a mapping, as data sets of Hugging Face and their collators have them.
_INPUTS = ("x", "pixel_values", "image", "img", "input_values", "inputs")
_TARGETS = ("y", "label", "labels", "target")
_CHUNK_BYTES = 16 * 2**20


@dataclass
class Samples:
    """Inputs with their labels or target values, read a slice at a time.

    Attributes
    ----------
    rows : Rows
        The inputs, shape (N, ...).
    targets : NDArray
        Labels, shape (N,), or target values, shape (N,) or (N, outputs).
    scale : float
        What stored inputs are multiplied by when read (1/255 for the pixels of image files).
    class_names, feature_names : tuple of str or None
        Names of the classes and, for tables, of the features, in the report.
    one_number : tuple of str or None
        Two labels of a table that are written differently, as 01 and 1, and are the same number.
    ids : tuple of int or str, or None
        What the user calls each sample.
    folder_numbers : tuple of int
        The names of all folders of images, ascending, where all are numbers: these are the labels then.
    """

    rows: Rows
    targets: NDArray
    scale: float = 1.0
    class_names: tuple[str, ...] | None = None
    feature_names: tuple[str, ...] | None = None
    one_number: tuple[str, str] | None = None
    ids: tuple[int | str, ...] | None = None
    folder_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_samples(self)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.rows.shape[1:]

    def limited(self, count: int) -> Samples:
        """Return the first `count` samples."""
        if count >= len(self):
            return self
        ids = None if self.ids is None else self.ids[:count]
        return dataclasses.replace(self, rows=_First(self.rows, count), targets=self.targets[:count], ids=ids)

    def inputs(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the inputs from `start` to before `stop` as a tensor of its own memory."""
        rows = self.rows.read(start, stop)
        wide = np.float64 if dtype == torch.float64 else np.float32
        values = np.array(rows, dtype=wide, order="C")
        if self.scale != 1.0:
            values *= wide(self.scale)
        return torch.from_numpy(values).to(dtype)

    def gather(self, indices: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the inputs of these indices."""
        rows = [self.inputs(index, index + 1, dtype) for index in indices]
        return torch.cat(rows) if rows else torch.zeros((0, *self.shape), dtype=dtype)


def kind_of(shape: Sequence[int], feature_names: Sequence[str] | None = None) -> Kind:
    """Return the likely kind of a sample of this shape: it decides how it is shown, and its natural range.

    Examples
    --------
    >>> [kind_of(shape) for shape in [(3, 32, 32), (28, 28), (12, 500), (200,), (13,)]]
    ['image', 'image', 'series', 'series', 'table']
    """
    if feature_names is not None:
        return "table"
    if len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[-1] in (1, 3, 4)):
        return "image"
    if len(shape) == 2:
        return "image" if min(shape) >= 8 and max(shape) <= 4 * min(shape) else "series"
    return "series" if len(shape) == 1 and shape[0] > 32 else "table"


class _First:
    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self.shape = (count, *rows.shape[1:])
        self.dtype = rows.dtype

    def read(self, start: int, stop: int) -> NDArray:
        return self._rows.read(start, min(stop, self.shape[0]))


@dataclass(frozen=True)
class Summary:
    """Statistics of all samples, from one pass."""

    # minimum, maximum: over all entries of all inputs
    minimum: float
    maximum: float
    spread: NDArray = field(repr=False)  # the standard deviation of each feature, in the shape of a sample
    fingerprint: str  # a hash of inputs and targets: equal data, equal fingerprint


def as_samples(data: Any, *, what: str = "data") -> Samples:
    """Return the samples of anything that an evaluation takes as data.

    data: arrays or tensors, in a mapping also ``class_names`` and ``feature_names``; or what yields (input, target)
        pairs, or batches of them. Pairs are read once and kept, beyond 256 MiB in a temporary file, so that every part
        of the evaluation sees the same samples.

    Raises InputError if the samples cannot be used; the message says which and why.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, Mapping):
        if not {"x", "y"} <= set(data):
            raise InputError(f"{what}: the arrays 'x' and 'y' are needed, got {sorted(map(str, data))}")
        x, y = (_array(data[key], what) for key in ("x", "y"))
        class_names, feature_names = (
            None if data.get(key) is None else tuple(map(str, data[key])) for key in ("class_names", "feature_names")
        )
        return Samples(ArrayRows(x), y, class_names=class_names, feature_names=feature_names)
    if is_of_maite(data) and hasattr(data, "__getitem__"):
        return _of_maite(data, what)
    if isinstance(data, torch.utils.data.DataLoader):
        return _spooled(_batches(data, what), what)
    if isinstance(data, (torch.utils.data.Dataset, torch.utils.data.IterableDataset)):
        return _of_items(data, what)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        x, y = (_array(part, what) for part in data)
        return Samples(ArrayRows(x), y)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes)):
        return _of_items(data, what)
    raise InputError(f"{what}: expected a pair of arrays (x, y), a Dataset or a DataLoader, got {type(data).__name__}")


def summarize(samples: Samples, task: Task) -> Summary:
    """Read all samples once: their range, spread and fingerprint.

    Raises InputError if an input is NaN or infinite; the message says which sample.
    """
    per_chunk = max(1, _CHUNK_BYTES // max(1, 4 * int(np.prod(samples.shape, dtype=np.int64))))
    digest = hashlib.sha256(repr((len(samples), samples.shape, task)).encode())
    low, high = np.inf, -np.inf
    total: NDArray = np.zeros(samples.shape)
    squares: NDArray = np.zeros(samples.shape)
    # Differences from the first sample: the sum of squares of what lies far from zero would lose its digits.
    origin = samples.inputs(0, 1).numpy()[0].astype(np.float64)
    for start in range(0, len(samples), per_chunk):
        chunk = samples.inputs(start, start + per_chunk).numpy()
        finite = np.isfinite(chunk.reshape(len(chunk), -1)).all(axis=1)
        if not finite.all():
            index = start + int(np.argmin(finite))
            kind = "NaN" if np.isnan(chunk[index - start]).any() else "an infinite value"
            raise InputError(f"sample {index} of x has {kind}; the inputs must be finite numbers")
        digest.update(as_bytes(chunk))
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
        total += (chunk - origin).sum(axis=0, dtype=np.float64)
        squares += np.square(chunk - origin, dtype=np.float64).sum(axis=0)
    digest.update(np.ascontiguousarray(samples.targets).tobytes())
    mean = total / len(samples)
    spread = np.sqrt(np.maximum(0.0, squares / len(samples) - mean * mean))
    return Summary(low, high, spread, digest.hexdigest()[:32])


def by_position(samples: Samples) -> Samples:
    """Return samples from folders with numbers as names, labeled by the order of the folders instead."""
    return dataclasses.replace(
        samples,
        targets=np.searchsorted(samples.folder_numbers, samples.targets),
        class_names=tuple(map(str, samples.folder_numbers)),
        folder_numbers=(),
    )


def _check_samples(samples: Samples) -> None:
    shape, dtype = samples.rows.shape, samples.rows.dtype
    if len(shape) < 2 or 0 in shape:
        raise InputError(f"x must have shape (samples, ...) with at least one sample, got {tuple(shape)}")
    if dtype.kind not in "biuf":
        raise InputError(f"x must be real numbers, got dtype {dtype}")
    targets = np.asarray(samples.targets)
    if targets.shape[:1] != shape[:1]:
        raise InputError(f"x and y differ in length: x has shape {tuple(shape)}, y has shape {targets.shape}")
    if targets.ndim > 2:
        raise InputError(f"y must have shape (samples,) or (samples, outputs), got {targets.shape}")
    if targets.dtype.kind in "US":
        names, targets = np.unique(targets.reshape(-1), return_inverse=True)
        samples.class_names = samples.class_names or tuple(map(str, names))
    elif targets.dtype.kind not in "biuf":
        raise InputError(f"y must be labels or numbers, got dtype {targets.dtype}")
    samples.targets = targets


def targets_for(samples: Samples, task: Task) -> NDArray:
    """Return the targets in the form of the task: int64 (N,) labels, or float32 (N, outputs) values.

    Raises InputError if labels are not whole numbers from 0, or values not finite.
    """
    targets = samples.targets
    if samples.one_number is not None and task == "classification":
        first, second = samples.one_number
        raise InputError(
            f"the labels {first!r} and {second!r} are the same number: write them alike if they are one class,"
            " or with a letter if they are two"
        )
    if task == "regression":
        values = targets.reshape(len(targets), -1).astype(np.float32)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise InputError(f"y of sample {int(np.argmax(bad))} is not a finite number")
        return values
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise InputError(
            f"y must hold one label per sample, shape (samples,), got {targets.shape}; of one-hot rows give"
            f" y.argmax(axis=1); for values to predict give {arg('task', 'regression')}"
        )
    if targets.dtype.kind == "f":
        whole = np.isfinite(targets) & (targets == np.round(targets)) & (np.abs(targets) < 2**53)
        if not whole.all():
            index = int(np.argmin(whole))
            raise InputError(
                f"the label of sample {index} is {targets[index]}, expected a class number from 0;"
                f" for values to predict give {arg('task', 'regression')}"
            )
    labels = targets.astype(np.int64)
    if labels.min() < 0:
        index = int(np.argmin(labels))
        raise InputError(f"the label of sample {index} is {labels[index]}, expected a class number from 0")
    return labels


def _array(value: Any, what: str) -> NDArray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.asarray(value)
    except Exception as error:
        raise InputError(f"{what}: {one_line(error)}") from None
    if array.dtype.hasobject:
        raise InputError(
            f"{what}: expected arrays of numbers, got an array of Python objects (rows of different lengths?)"
        )
    return array


def _pair(item: Any, what: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        found = [next((item[name] for name in names if name in item), None) for names in (_INPUTS, _TARGETS)]
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
        names = ", ".join(map(str, list(item)[:8]))
        raise InputError(
            f"{what}: an item has the entries {names}; expected one of {', '.join(_INPUTS)} and one of"
            f" {', '.join(_TARGETS)}: rename them"
        )
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    many = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    raise InputError(f"{what}: expected (input, target) pairs, got {type(item).__name__}{many}")


def _batches(loader: Iterable[Any], what: str) -> Iterator[tuple[NDArray, NDArray]]:
    for batch in loader:
        x, y = _pair(batch, what)
        yield _array(x, what), _array(y, what)


def _of_items(dataset: Any, what: str) -> Samples:
    """Return the samples of a data set that gives one at a time; images of Pillow as those of a folder are read."""
    reader = PixelReader()
    items = (dataset[i] for i in range(len(dataset))) if hasattr(dataset, "__len__") else dataset

    def pairs() -> Iterator[tuple[NDArray, NDArray]]:
        for item in items:
            x, y = _pair(item, what)
            yield (reader.read(x) if is_picture(x) else _array(x, what))[None], _array(y, what)[None]

    samples = _spooled(pairs(), what)
    if not reader.count:
        return samples
    if reader.count < len(samples):
        raise InputError(f"{what}: {reader.count} of {len(samples)} samples are images of Pillow; give all in one form")
    return dataclasses.replace(samples, scale=1 / np.iinfo(samples.rows.dtype).max)


def _of_maite(dataset: Any, what: str) -> Samples:
    ids: list[int | str] = []

    def pairs() -> Iterator[tuple[NDArray, NDArray]]:
        for x, label, name in triples(dataset, what):
            ids.append(name)
            yield x[None], np.array([label])

    samples = _spooled(pairs(), what)
    return dataclasses.replace(samples, ids=tuple(ids), class_names=class_names_of(dataset))


def _spooled(pairs: Iterator[tuple[NDArray, NDArray]], what: str) -> Samples:
    def refuse(message: str) -> Exception:
        return InputError(f"{what}: {message}")

    inputs, targets = Spool(refuse), []
    try:
        for x, y in pairs:
            if x.ndim == 0 or y.shape[:1] != x.shape[:1]:
                raise refuse(f"inputs of shape {x.shape} come with targets of shape {y.shape}")
            inputs.append(x)
            targets.append(y)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's own Dataset
        raise InputError(f"{what}: reading sample {inputs.count} raised {one_line(error)}") from error
    if not targets:
        raise InputError(f"{what}: there are no samples")
    return Samples(inputs.rows(), np.concatenate(targets))
