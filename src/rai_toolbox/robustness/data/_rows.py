"""Arrays that are read a slice at a time, so that memory does not grow with the number of samples."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from typing import IO, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

_IN_MEMORY = 256 * 2**20


class Rows(Protocol):
    """A sequence of samples of one shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> NDArray:
        """Return the samples from `start` to before `stop`."""
        ...


def as_bytes(array: NDArray) -> memoryview:
    """Return the memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8).data)


class ArrayRows:
    """Rows of an array in memory."""

    def __init__(self, array: NDArray) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def read(self, start: int, stop: int) -> NDArray:
        return self.array[start:stop]


class FileRows:
    """Rows of a C-ordered array that lies in an open file, from byte `offset` on.

    They are read, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._file = file
        self._offset = offset
        self.shape = shape
        self.dtype = np.dtype(dtype)
        weakref.finalize(self, file.close)
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray:
        start, stop = min(start, self.shape[0]), min(stop, self.shape[0])
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._file.seek(self._offset + start * self._row_bytes)
        # readinto of an unbuffered file may stop short.
        view, filled = as_bytes(rows), 0
        while filled < len(view):
            count = self._file.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise OSError("the file of the samples became shorter while it was read")
            filled += count
        return rows


class Spool:
    """Collects samples that come one batch at a time; beyond 256 MiB they go to a file that has no name.

    refuse: makes the exception to raise for samples of another shape or kind of number than the first ones.
    """

    def __init__(self, refuse: Callable[[str], Exception], in_memory: int = _IN_MEMORY) -> None:
        self._refuse = refuse
        self._limit = in_memory
        self._chunks: list[NDArray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] | None = None
        self._dtype = np.dtype(np.float32)
        self.count = 0

    def append(self, rows: NDArray) -> None:
        if self._shape is None:
            self._shape, self._dtype = rows.shape[1:], rows.dtype
        elif rows.shape[1:] != self._shape:
            raise self._refuse(
                f"samples differ in shape: sample 0 is {self._shape}, sample {self.count} is {rows.shape[1:]}"
            )
        elif not (rows.dtype.kind == self._dtype.kind == "f" or np.can_cast(rows.dtype, self._dtype)):
            raise self._refuse(
                f"samples differ in dtype: sample 0 is {self._dtype}, sample {self.count} is {rows.dtype}"
            )
        rows = np.ascontiguousarray(rows, self._dtype)
        self.count += len(rows)
        self._bytes += rows.nbytes
        if self._file is None:
            self._chunks.append(rows)
            if self._bytes > self._limit:
                self._file = tempfile.TemporaryFile(prefix="rai-toolbox-samples-")  # noqa: SIM115
                for chunk in self._chunks:
                    self._file.write(as_bytes(chunk))
                self._chunks.clear()
        else:
            self._file.write(as_bytes(rows))

    def rows(self) -> Rows:
        shape = (self.count, *(self._shape or ()))
        if self._file is None:
            return ArrayRows(np.concatenate(self._chunks) if self._chunks else np.zeros((0,), np.float32))
        self._file.flush()
        return FileRows(self._file, 0, shape, self._dtype)
