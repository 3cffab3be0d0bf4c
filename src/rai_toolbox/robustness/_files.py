"""Files that are either whole or not there, whatever moment the process ends at; and folders with one writer."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import filelock

from rai_toolbox.robustness._errors import InputError, WriteFailed

_PARTIAL = ".partial-"
_LOCK = ".lock"
_HOLDER = ".lock-holder"
#: The folder of what a run has done so far, in its output folder.
UNFINISHED = "unfinished"

_held = threading.local()

# What an archive may unpack to: this, or so many times its own size. Arrays hardly shrink as much; a bomb does more.
_UNPACKED = 256 * 2**20
_RATIO = 100


def check_unpacked_size(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise InputError where an archive unpacks to far more than it takes on the disk."""
    unpacked, packed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if unpacked > max(_UNPACKED, _RATIO * packed):
        raise InputError(
            f"{str(path)!r} has {packed} bytes and unpacks to {unpacked}, more than {_RATIO} times as many, so it"
            " is not read; write it again without compression"
        )


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` when the block ends well, and not at all otherwise.

    Raises WriteFailed if it cannot be written, as on a full disk.
    """
    with _writing(path):
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


def write_together(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Write several files, and remove those without a content; the last says that the others are there.

    All are on disk under other names before the first takes its own, so that a full disk leaves those of an earlier
    run as they are; and the last is away while the others are renamed, so that it never stands beside older ones.
    """
    waiting: list[tuple[str, Path]] = []
    *_, last = contents
    try:
        for name, content in contents.items():
            if content is None:
                continue
            with _writing(folder / name):
                handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=folder)
                waiting.append((partial, folder / name))
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(partial, 0o666 & ~_umask())
        for name in (last, *(name for name, content in contents.items() if content is None)):
            with _writing(folder / name):
                (folder / name).unlink(missing_ok=True)
        for partial, path in waiting:
            with _writing(path):
                os.replace(partial, path)
    finally:
        for partial, _ in waiting:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def as_folder(folder: str | Path) -> Path:
    """Return a path; an empty one, which would be the current folder, is refused."""
    if isinstance(folder, str) and not folder.strip():
        raise InputError("the output folder is empty (a variable of a shell that is not set?): name one")
    return Path(folder)


def prepare_folder(path: Path) -> None:
    """Make the folder, test that it is writable, and remove half-written files of a killed run.

    Raises InputError if `path` is a file, or cannot be made or written to.
    """
    _make_folder(path)
    for left in path.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(path: Path, names: Iterable[str] = ()) -> Iterator[None]:
    """Prepare a folder, in which this thread alone writes until the block ends: files of these names.

    Raises InputError if another process or thread writes there, which the message names; if the folder has files of
    these names that are not of an earlier run; or as `prepare_folder`.
    """
    _make_folder(path)
    held: set[str] = vars(_held).setdefault("folders", set())
    name = os.path.realpath(path)
    if name in held:
        yield
        return
    lock = filelock.FileLock(path / _LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            f"the output folder {str(path)!r} is in use by {_holder(path)}: wait until that run ends, or give"
            " another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"the output folder {str(path)!r} cannot be locked: {error}") from None
    held.add(name)
    try:
        with contextlib.suppress(OSError):  # on a full disk: the lock holds without the name of its holder
            (path / _HOLDER).write_text(_myself(), "utf-8")
        prepare_folder(path)
        _refuse_others(path, names)
        yield
    finally:
        held.discard(name)
        for left in (_HOLDER, _LOCK):
            with contextlib.suppress(OSError):
                (path / left).unlink(missing_ok=True)
        lock.release()


def _refuse_others(path: Path, names: Iterable[str]) -> None:
    """Raise InputError where the folder has files of these names, and nothing says that they are of an earlier run."""
    taken = sorted(name for name in names if (path / name).is_file() and not (path / name).is_symlink())
    if taken and not (path / UNFINISHED).is_dir() and not any(map(_is_result, path.glob("*.json"))):
        raise InputError(
            f"the output folder {str(path)!r} has {', '.join(taken)}, which no evaluation wrote, and which would be"
            " replaced or removed: give another folder"
        )


def _is_result(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"rai-toolbox/' in file.read(100)
    except OSError:
        return False


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=_PARTIAL, dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"the output folder {str(path)!r} cannot be made: there is a file of that name") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the output folder {str(path)!r} cannot be written to: {reason}") from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def _myself() -> str:
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


def _holder(path: Path) -> str:
    try:
        return " ".join((path / _HOLDER).read_text("utf-8")[:200].split()) or "another process"
    except (OSError, ValueError):
        return "another process"


def _umask() -> int:
    # mkstemp makes files that only their owner can read; a report is made like any other file.
    mask = os.umask(0)
    os.umask(mask)
    return mask
