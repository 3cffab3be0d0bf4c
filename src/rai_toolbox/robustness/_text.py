"""Words for messages: an exception as one line, hints at what was meant."""

from __future__ import annotations

import difflib

__all__ = ["did_you_mean", "one_line"]


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most some three hundred characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint at the known names that look like `name`, to be put after a message."""
    alike = difflib.get_close_matches(name, known, n=3)
    if alike:
        return f"; did you mean {' or '.join(map(repr, alike))}?"
    return f"; there is {', '.join(sorted(known)[:8])}" if known else ""
