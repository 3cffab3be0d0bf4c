"""Errors of an evaluation: the caller's mistake, or a failed run."""

from __future__ import annotations

import re
from collections.abc import Callable

# Around the name of an argument in a message: characters that no text uses.
_ARGUMENT = re.compile("\ue000(\\w+)(?:=([^\ue000]*))?\ue000")


def arg(name: str, value: str | bool | None = None) -> str:
    """Return an argument of the library for use in a message of the errors below.

    The library shows ``resume=True`` where the command shows ``--resume``.
    """
    return f"\ue000{name}{'' if value is None else f'={value}'}\ue000"


def spelled(message: str, spell: Callable[[str, str | None], str]) -> str:
    """Return a message whose arguments are spelled by a function of their name and value."""
    return _ARGUMENT.sub(lambda found: spell(found[1], found[2]), message)


def _in_python(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value if value == 'True' else repr(value)}"


class _Named(Exception):
    """An error whose message names arguments.

    message: as it was given, with the marks of `arg`.
    argument: the name of the first argument in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(spelled(message, _in_python))
        self.message = message
        found = _ARGUMENT.search(message)
        self.argument = found[1] if found else None

    def __reduce__(self) -> tuple[type[_Named], tuple[str]]:
        return type(self), (self.message,)


class InputError(_Named, ValueError):
    """An argument cannot be used; the message is one line that says what to give instead."""


class EvaluationFailed(_Named, RuntimeError):
    """The evaluation began and could not go on; finished batches are kept for a later ``resume``."""


class WriteFailed(EvaluationFailed):
    """A file cannot be written, as on a full disk; what was finished before is kept."""
