"""npz archives as data: no pickles, nothing unpacked to disk under a name, read a slice at a time."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness._files import check_unpacked_size
from rai_toolbox.robustness.data._rows import ArrayRows, FileRows, Rows, Spool

_CHUNK = 16 * 2**20
_WHOLE = 4 * 2**30
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class NpzArchive:
    """The arrays of an .npz file.

    Every failure of a malformed archive is an `InputError` that names the file and the array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            check_unpacked_size(self._zip, path)
            self._members = {name.removesuffix(".npy"): name for name in self._zip.namelist()}
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        except Exception:  # hostile archives raise nearly anything
            raise InputError(
                f"{str(path)!r} is not an npz archive; write one with numpy.savez({path.name!r}, x=x, y=y)"
            ) from None
        if len(self._members) < len(self._zip.namelist()):
            raise InputError(f"{str(path)!r} has two arrays of one name: which one is meant cannot be known")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def array(self, name: str) -> NDArray:
        """Return a whole array."""
        rows = self._read(name, whole=True)
        assert isinstance(rows, ArrayRows)
        return rows.array

    def rows(self, name: str) -> Rows:
        """Return an array whose first dimension is read in slices."""
        return self._read(name, whole=False)

    def _read(self, name: str, *, whole: bool) -> Rows:
        try:
            with self._zip.open(self._members[name]) as member:
                shape, fortran, dtype, header = _read_header(member)
                _check(self.path, name, shape, dtype)
                info = self._zip.getinfo(self._members[name])
                size = math.prod(shape) * dtype.itemsize
                if info.file_size - header != size:
                    raise InputError(
                        f"array {name!r} of {str(self.path)!r} says it has shape {shape}, {size} bytes,"
                        f" but {info.file_size - header} are there"
                    )
                if whole or fortran or not shape:
                    if size > _WHOLE:
                        raise InputError(
                            f"array {name!r} of {str(self.path)!r} has {size} bytes, and has to be read whole:"
                            f" at most {_WHOLE} are"
                        )
                    return ArrayRows(_read_whole(member, shape, fortran, dtype))
                if info.compress_type == zipfile.ZIP_STORED:
                    return FileRows(self.path.open("rb"), self._data_offset(info) + header, shape, dtype)
                return _unpack(member, shape, dtype)
        except InputError:
            raise
        except MemoryError:
            raise InputError(f"array {name!r} of {str(self.path)!r} does not fit in memory") from None
        except Exception as error:  # zlib.error, BadZipFile, EOFError, UnicodeError, ...: all mean the same here
            raise InputError(f"array {name!r} of {str(self.path)!r} cannot be read: {_one_line(error)}") from None

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if magic != b"PK\x03\x04":
                raise zipfile.BadZipFile("no local header where the index says it is")
            return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def read_npy(path: Path) -> NDArray:
    """Return the array of a .npy file, which may not hold pickled objects."""
    try:
        with path.open("rb") as file:
            shape, fortran, dtype, header = _read_header(file)
            _check(path, path.name, shape, dtype)
            if path.stat().st_size - header != math.prod(shape) * dtype.itemsize:
                raise ValueError("its length is not what its header says")
            return _read_whole(file, shape, fortran, dtype)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except Exception as error:
        raise InputError(f"{str(path)!r} is not a .npy array: {_one_line(error)}") from None


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype, file.tell()


def _check(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise InputError(
            f"array {name!r} of {str(path)!r} holds pickled Python objects, which could run code when read;"
            " save it as an array of numbers"
        )
    if any(length < 0 for length in shape) or dtype.kind not in "biufUS":
        raise InputError(f"array {name!r} of {str(path)!r} has dtype {dtype}, expected real numbers")


def _read_whole(file: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> NDArray:
    content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise EOFError("the file ends too early")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _unpack(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> Rows:
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    spool = Spool(InputError)
    per_chunk = max(1, _CHUNK // max(1, row_bytes))
    while spool.count < shape[0]:
        count = min(per_chunk, shape[0] - spool.count)
        content = member.read(count * row_bytes)
        if len(content) != count * row_bytes:
            raise EOFError("the archive ends too early")
        spool.append(np.frombuffer(content, dtype).reshape(count, *shape[1:]))
    return spool.rows()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
