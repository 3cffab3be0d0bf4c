"""Errors of an evaluation: the caller's mistake, or a failed run."""

from __future__ import annotations

__all__ = ["EvaluationFailed", "InputError"]


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to give instead."""


class EvaluationFailed(RuntimeError):
    """The evaluation began and could not go on; finished batches are kept for a later ``resume``."""
