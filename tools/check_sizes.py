#!/usr/bin/env python
"""Fail on a file of the sources of more than 400 lines, and on a function of more than 60 lines of code.

Lines of code of a function are those of its definition but for its docstring, comments and empty lines. `make check`
runs this.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

# Files, and functions as file:name, that are longer. Take a line out when it no longer is.
EXCEPTIONS: set[str] = set()


def errors_of(source: Path, exceptions: Collection[str]) -> list[str]:
    """Return one line for each file and each function under `source` that is too long."""
    errors: list[str] = []
    excused: set[str] = set()
    for file in sorted(source.rglob("*.py")):
        path, text = file.relative_to(source).as_posix(), file.read_text("utf-8")
        count = text.count("\n")
        if count > LONGEST_FILE and path in exceptions:
            excused.add(path)
        elif count > LONGEST_FILE:
            errors.append(f"{path}: {count} lines, at most {LONGEST_FILE}: split it")
        for function in _functions(ast.parse(text)):
            name, code = f"{path}:{function.name}", _lines_of_code(function, text.splitlines())
            if code > LONGEST_FUNCTION and name not in exceptions:
                errors.append(f"{name}: {code} lines of code, at most {LONGEST_FUNCTION}: split it")
            elif code > LONGEST_FUNCTION:
                excused.add(name)
    stale = sorted(set(exceptions) - excused)
    return errors + [f"{name}: is short enough or gone: take it out of EXCEPTIONS" for name in stale]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    first, end = function.body[0], function.end_lineno or function.lineno
    has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    docstring = range(first.lineno, (first.end_lineno or first.lineno) + 1) if has_docstring else range(0)
    numbers = (number for number in range(function.lineno, end + 1) if number not in docstring)
    return sum(bool(code) and not code.startswith("#") for code in (lines[number - 1].strip() for number in numbers))


if __name__ == "__main__":
    found = errors_of(SOURCE, EXCEPTIONS)
    print("\n".join(found) or f"sizes: files of at most {LONGEST_FILE} lines, functions of at most {LONGEST_FUNCTION}")
    sys.exit(bool(found))
