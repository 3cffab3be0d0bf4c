"""Words for messages: an exception as one line, hints at what was meant, long names made short."""

from __future__ import annotations

import difflib


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most some three hundred characters."""
    text = " ".join(str(error).split())
    text = shortened(text, 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shortened(text: str, most: int = 60) -> str:
    """Return a text of at most so many characters, the last of which tells that there is more."""
    return text if len(text) <= most else text[: most - 1] + "…"


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint at the known names that look like `name`, to be put after a message."""
    name, known = shortened(name), [shortened(one) for one in known]
    alike = difflib.get_close_matches(name, known, n=3)
    if alike:
        return f"; did you mean {' or '.join(map(repr, alike))}?"
    return f"; there is {', '.join(sorted(known)[:8])}" if known else ""
