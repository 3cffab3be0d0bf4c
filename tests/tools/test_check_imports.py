"""The check of our imports finds circles and imports inside functions, and our own sources have none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "tools" / "check_imports.py"
_SPEC = importlib.util.spec_from_file_location("check_imports", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
check_imports = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_imports)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "rai_toolbox").mkdir()
    (tmp_path / "rai_toolbox" / "__init__.py").write_text("from rai_toolbox._a import x\n")
    (tmp_path / "rai_toolbox" / "_a.py").write_text("from rai_toolbox import _b\nx = _b.y\n")
    (tmp_path / "rai_toolbox" / "_b.py").write_text("import json\ny = 1\ndef f():\n    import csv\n    return csv\n")
    return tmp_path


def test_our_sources_have_no_circle_and_no_import_inside_a_function() -> None:
    assert check_imports.errors_of(check_imports.SOURCE, check_imports.EXCEPTIONS) == []


def test_imports_that_go_down_are_right(package: Path) -> None:
    assert check_imports.errors_of(package, ()) == []


@pytest.mark.parametrize(
    "statement", ["from rai_toolbox._a import x", "import rai_toolbox._a", "from rai_toolbox import _a"]
)
def test_a_circle_is_found(package: Path, statement: str) -> None:
    (package / "rai_toolbox" / "_b.py").write_text(f"y = 1\n{statement}\n")
    (error,) = check_imports.errors_of(package, ())
    assert error.startswith("import circle: ")
    assert "rai_toolbox._a -> " in error


def test_an_import_inside_a_function_is_found_unless_it_is_an_exception(package: Path) -> None:
    path = "rai_toolbox/_b.py"
    (package / path).write_text("y = 1\nasync def f():\n    from rai_toolbox import _a\n    return _a\n")
    assert check_imports.errors_of(package, ()) == [
        f"{path}:3: import inside a function: move it to the top of the file"
    ]
    assert check_imports.errors_of(package, {path}) == []


def test_an_exception_that_is_none_any_more_is_named(package: Path) -> None:
    (error,) = check_imports.errors_of(package, {"rai_toolbox/_a.py"})
    assert "take it out of EXCEPTIONS" in error
