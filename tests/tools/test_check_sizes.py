"""The check of sizes finds a long file and a long function, and our own sources have none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "tools" / "check_sizes.py"
_SPEC = importlib.util.spec_from_file_location("check_sizes", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
check_sizes = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_sizes)


def function(lines: int) -> str:
    """The text of a function with so many lines of code."""
    return "def f():\n" + '    """Two\n\n    lines."""\n' + "    # a comment\n\n" + "    x = 1\n" * (lines - 1)


def test_our_sources_keep_the_sizes() -> None:
    assert check_sizes.errors_of(check_sizes.SOURCE, check_sizes.EXCEPTIONS) == []


@pytest.mark.parametrize("lines", [400, 401])
def test_a_file_may_have_400_lines(tmp_path: Path, lines: int) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * lines)
    errors = check_sizes.errors_of(tmp_path, ())
    assert errors == ([] if lines == 400 else ["a.py: 401 lines, at most 400: split it"])


@pytest.mark.parametrize("lines", [60, 61])
def test_a_function_may_have_60_lines_of_code(tmp_path: Path, lines: int) -> None:
    (tmp_path / "a.py").write_text(function(lines))
    errors = check_sizes.errors_of(tmp_path, ())
    assert errors == ([] if lines == 60 else ["a.py:f: 61 lines of code, at most 60: split it"])
    assert check_sizes.errors_of(tmp_path, {"a.py:f"}) == (
        [] if lines == 61 else ["a.py:f: is short enough or gone: take it out of EXCEPTIONS"]
    )
