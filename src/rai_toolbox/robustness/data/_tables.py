"""Tables (CSV, Parquet) with a label column: one row, one sample."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._text import did_you_mean, one_line
from rai_toolbox.robustness.data._rows import Spool
from rai_toolbox.robustness.data._samples import Samples

_LABELS = ("label", "target", "y", "class")
_CHUNK = 4096


def load_table(path: Path, label_column: str | None) -> Samples:
    """Return the rows of a table as samples of shape (features,).

    Raises InputError if the table has no such label column, or a cell of a feature is not a number; the message names
        row and column.
    """
    if path.suffix.lower() == ".parquet":
        names, chunks = _parquet(path)
    else:
        names, chunks = _csv(path)
    label = _label_index(path, names, label_column)
    features = tuple(name for index, name in enumerate(names) if index != label)
    if not features:
        raise InputError(f"{str(path)!r} has the column {names[label]!r} alone: there are no features")
    spool = Spool(InputError)
    targets: list[str] = []
    for first_row, columns in chunks:
        labels = columns.pop(label)
        targets.extend("" if value is None else str(value) for value in labels)
        block = [_numbers(path, name, first_row, column) for name, column in zip(features, columns, strict=True)]
        spool.append(np.stack(block, axis=1))
    if not targets:
        raise InputError(f"{str(path)!r} has no rows")
    return Samples(
        spool.rows(), _targets(path, names[label], targets), feature_names=features, one_number=_one_number(targets)
    )


def _label_index(path: Path, names: Sequence[str], wanted: str | None) -> int:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{str(path)!r} has two columns named {twice!r}")
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{str(path)!r} has no column {wanted!r}{did_you_mean(wanted, list(names))}")
        return names.index(wanted)
    found = [name for name in names if name.lower() in _LABELS]
    if len(found) != 1:
        raise InputError(
            f"{str(path)!r}: say which column holds the label with {arg('label_column')}; the columns are"
            f" {', '.join(names[:20])}"
        )
    return names.index(found[0])


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[int, list[list[str]]]]]:
    def rows() -> Iterator[list[str]]:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
                yield from csv.reader(file, delimiter=delimiter, strict=True)
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise InputError(f"{str(path)!r} is not UTF-8 text") from None
        except csv.Error as error:
            raise InputError(f"{str(path)!r} is not a CSV table: {error}") from None

    lines = rows()
    names = [name.strip() for name in next(lines, [])]
    if len(names) < 2:
        raise InputError(f"{str(path)!r} must begin with a line of at least two column names, separated by commas")

    def chunks() -> Iterator[tuple[int, list[list[str]]]]:
        kept: list[list[str]] = []
        number = first = 2  # the row as an editor counts it: the header is row 1
        for number, line in enumerate(lines, start=2):
            if not line:
                continue
            if len(line) != len(names):
                raise InputError(f"{str(path)!r}, row {number}: {len(line)} cells, but {len(names)} columns")
            if not kept:
                first = number
            kept.append(line)
            if len(kept) == _CHUNK:
                yield first, [list(column) for column in zip(*kept, strict=True)]
                kept = []
        if kept:
            yield first, [list(column) for column in zip(*kept, strict=True)]

    return names, chunks()


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, list[list[Any]]]]]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("reading a Parquet file needs pyarrow: pip install pyarrow, or write a .csv") from None
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except Exception as error:  # hostile files raise nearly anything
        raise InputError(f"{str(path)!r} is not a Parquet table: {one_line(error)}") from None

    def chunks() -> Iterator[tuple[int, list[list[Any]]]]:
        first = 1
        try:
            for batch in file.iter_batches(batch_size=_CHUNK):
                yield first, [column.to_pylist() for column in batch.columns]
                first += batch.num_rows
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{str(path)!r} cannot be read: {one_line(error)}") from None

    return names, chunks()


def _numbers(path: Path, name: str, first_row: int, column: Sequence[Any]) -> np.ndarray:
    try:
        return np.array(column, dtype=np.float64).astype(np.float32)
    except (ValueError, TypeError, OverflowError):
        bad = next((offset for offset, value in enumerate(column) if not _is_number(value)), None)
    if bad is None:
        raise InputError(f"{str(path)!r}, column {name!r} does not hold numbers that float64 can")
    value = column[bad]
    given = "empty" if value in (None, "") else repr(value if len(str(value)) < 40 else f"{str(value)[:37]}...")
    raise InputError(
        f"{str(path)!r}, row {first_row + bad}, column {name!r} is {given}, not a number;"
        " encode categories as numbers and fill or drop missing cells"
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _targets(path: Path, name: str, values: list[str]) -> np.ndarray:
    if "" in values:
        raise InputError(f"{str(path)!r}: the label column {name!r} is empty in sample {values.index('')}")
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        return np.array(values)


def _one_number(labels: list[str]) -> tuple[str, str] | None:
    """Return two whole numbers that are written differently and are the same, or None; 1 and 1.0 may be mixed."""
    seen: dict[int, str] = {}
    for word in dict.fromkeys(map(str.strip, labels)):
        if word.lstrip("+-").isdecimal() and len(word) < 100 and seen.setdefault(int(word), word) != word:
            return seen[int(word)], word
    return None
