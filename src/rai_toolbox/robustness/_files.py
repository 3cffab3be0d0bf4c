"""Files that are either whole or not there, whatever moment the process ends at."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rai_toolbox.robustness._errors import InputError

__all__ = ["atomic_write", "prepare_folder", "write_bytes", "write_text"]

_PARTIAL = ".partial-"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` when the block ends well, and not at all otherwise."""
    handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 file or none."""
    write_bytes(path, content.encode("utf-8"))


def prepare_folder(path: Path) -> None:
    """Make the folder, test that it is writable, and remove half-written files of a killed run.

    Raises
    ------
    InputError
        If `path` is a file, or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=_PARTIAL, dir=path):
            pass
        for left in path.glob(f"{_PARTIAL}*"):
            left.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"the output folder {str(path)!r} cannot be made: there is a file of that name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the output folder {str(path)!r} cannot be written to: {reason}") from None


def _umask() -> int:
    # mkstemp makes files that only their owner can read; a report is made like any other file.
    mask = os.umask(0)
    os.umask(mask)
    return mask
