#!/usr/bin/env python
"""Fail on an import circle, and on an import of our own modules inside a function: `make check` runs this.

An import inside a function hides a circle, and a reader does not find it at the top of the file. Imports are absolute
(ruff, TID252), so that a name in an import statement is a module's name.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "rai_toolbox"

# Files that still import inside functions. Take a line out when its file no longer does.
EXCEPTIONS: set[str] = set()


def errors_of(source: Path, exceptions: Collection[str]) -> list[str]:
    """Return one line for each thing that is wrong with the imports under `source`."""
    files = {_module_name(file.relative_to(source)): file for file in sorted(source.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    errors: list[str] = []
    for module, file in files.items():
        path = file.relative_to(source).as_posix()
        tree = ast.parse(file.read_text("utf-8"))
        hidden = set(_inside_functions(tree))
        lines = sorted({node.lineno for node in _imports(hidden) if any(map(_is_ours, _names(node)))})
        if path not in exceptions:
            errors += [f"{path}:{line}: import inside a function: move it to the top of the file" for line in lines]
        elif not lines:
            errors.append(f"{path}: imports nothing inside a function any more: take it out of EXCEPTIONS")
        names = {name for node in _imports(set(ast.walk(tree)) - hidden) for name in _names(node)}
        # The __init__ of a package has begun to run whenever one of the package's modules is imported.
        graph[module] = {name for name in names if name in files and not f"{module}.".startswith(f"{name}.")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        errors.append(f"import circle: {' -> '.join(reversed(error.args[1]))}")
    return errors


def _module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _inside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from ast.walk(function)


def _imports(nodes: Collection[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))


def _names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return what a statement may import: ``from a import b`` is of the module a, or of a.b."""
    names = [alias.name for alias in node.names]
    return names if isinstance(node, ast.Import) else [f"{node.module}", *(f"{node.module}.{name}" for name in names)]


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == PACKAGE


if __name__ == "__main__":
    found = errors_of(SOURCE, EXCEPTIONS)
    print("\n".join(found) or "imports: no circle, and none inside a function beyond the exceptions")
    sys.exit(bool(found))
