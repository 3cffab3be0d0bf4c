"""Finished pieces of an evaluation, each on disk before the next one starts."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import UNFINISHED, prepare_folder, write_bytes, write_text

_HEAD = "run.json"

#: The entry of a run's key with the model's outputs on a few samples: compared up to rounding.
MODEL_OUTPUT = "model_output"
_OUTPUT_TOLERANCE = 1e-2

Piece = dict[str, NDArray]


class Journal:
    """Pieces by name, in memory and, where a folder is given, on disk.

    A piece is one file, written under another name and renamed: after a kill at any moment it is whole or absent.

    folder: the output folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / UNFINISHED
        self._pieces: dict[str, Piece] = {}

    def begin(self, key: Mapping[str, Any], *, resume: bool, overwrite: bool = False) -> None:
        """Start a new journal, or go on with the one that is there.

        key: what decides the figures; a journal of another key cannot be gone on with.
        resume, overwrite: whether to go on with an unfinished run that is there, or to throw it away.

        Raises InputError if an unfinished run is there and neither was asked for, or it is of another key.
        """
        if self._folder is None:
            return
        head = self._folder / _HEAD
        if head.exists() and not overwrite:
            if not resume:
                raise InputError(
                    f"{str(self._folder.parent)!r} holds an unfinished run: add {arg('resume', True)} to go on"
                    f" with it, or {arg('overwrite', True)} to start again"
                )
            _check_key(_read_head(head), json.loads(json.dumps(key)), self._folder.parent)
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        prepare_folder(self._folder)
        write_text(head, json.dumps(key, indent=1))

    def follow(self, key: Mapping[str, Any], *, resume: bool, overwrite: bool = False) -> None:
        """Do as `begin` does, in a process that does not lead: in a folder that it shares with the leader the journal
        is there by now; one of another machine's own may be there from an earlier run.
        """
        try:
            self.begin(key, resume=True)
        except InputError:
            if not overwrite:
                raise
            self.begin(key, resume=resume, overwrite=True)

    def get(self, name: str) -> Piece | None:
        """Return a finished piece, or None."""
        if name not in self._pieces and self._folder is not None:
            piece = _read(self._folder / f"{name}.npz")
            if piece is None:
                return None
            self._pieces[name] = piece
        return self._pieces.get(name)

    def put(self, name: str, piece: Mapping[str, Any]) -> None:
        """Keep a finished piece."""
        arrays = {key: np.asarray(value) for key, value in piece.items()}
        self._pieces[name] = arrays
        if self._folder is not None:
            _write(self._folder / f"{name}.npz", arrays)
            self.part_of(name).forget()

    def part_of(self, piece: str) -> PartOfPiece:
        """Return where a piece that is not finished keeps what it has."""
        return PartOfPiece(None if self._folder is None else self._folder / f"{piece}.under-way")

    def learn(self, pieces: Mapping[str, Piece]) -> None:
        """Take in pieces that another process has finished."""
        self._pieces.update(pieces)

    def finish(self) -> None:
        """Remove the files: the results are written."""
        if self._folder is not None:
            # The head goes first: without it the rest is no unfinished run.
            with contextlib.suppress(OSError):
                (self._folder / _HEAD).unlink()
            shutil.rmtree(self._folder, ignore_errors=True)


class PartOfPiece:
    """What a piece has found before it is finished: a file by name, in a folder of its own, and nothing in memory.

    folder: the folder; without one nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str) -> Piece | None:
        """Return what was kept under a name by this process or an earlier one, or None."""
        return None if self._folder is None else _read(self._folder / f"{name}.npz")

    def put(self, name: str, arrays: Mapping[str, NDArray]) -> None:
        """Keep arrays under a name, instead of what was there."""
        if self._folder is not None:
            prepare_folder(self._folder)
            _write(self._folder / f"{name}.npz", arrays)

    def forget(self) -> None:
        """Remove the files: the piece is finished."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> Piece | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception:  # absent, or damaged by other hands: it is done again
        return None


def _write(path: Path, arrays: Mapping[str, NDArray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def _read_head(head: Path) -> Any:
    try:
        return json.loads(head.read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{str(head)!r} is damaged: add {arg('overwrite', True)} to start again") from None


def _same(name: str, before: Any, now: Any) -> bool:
    if name != MODEL_OUTPUT:
        return before == now
    was, is_now = (np.asarray(output, dtype=np.float64) for output in (before, now))
    if was.shape != is_now.shape:
        return False
    # Another device, or another number of threads, rounds otherwise.
    close = _OUTPUT_TOLERANCE * np.nanmax(np.abs(np.where(np.isfinite(was), was, 0.0)), initial=0.0)
    return np.allclose(was, is_now, rtol=_OUTPUT_TOLERANCE, atol=close, equal_nan=True)


def _check_key(before: Any, now: Mapping[str, Any], folder: Path) -> None:
    differing = [name for name in now if not isinstance(before, dict) or not _same(name, before.get(name), now[name])]
    if differing:
        name = differing[0]
        was = before.get(name) if isinstance(before, dict) else None
        detail = f" ({was} then, {now[name]} now)" if len(f"{was}{now[name]}") < 80 else ""
        raise InputError(
            f"the unfinished run in {str(folder)!r} had another {name.replace('_', ' ')}{detail}:"
            f" give what it had, or add {arg('overwrite', True)} to start again"
        )
