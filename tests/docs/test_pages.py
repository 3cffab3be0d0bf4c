"""Every Python example of the pages runs: the cells of the tutorials, and the blocks of the other pages.

`make docs` runs the same cells in notebooks, for their pictures. Here they run in the process of the test, where a
warning is an error, so that `make test` needs no site.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import has_fsdp2_on_a_cpu

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts and "generated" not in page.parts]

_BLOCK = re.compile(r"^```(?P<kind>\{code-cell\}|python|pycon)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = {
    "lightning": "lightning",
    "sharded_digits": "torch.distributed",
    "numpy as np\nimport torch\nfrom maite": "maite",
}
_SLOW = {"evaluate.md": [pytest.mark.slow], "lightning.md": [pytest.mark.slow], "fsdp2.md": [pytest.mark.distributed]}


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The Python blocks of a page: what kind, the code, and the line before its first."""
    text = page.read_text("utf-8")
    return [(m["kind"], m["code"], text.count("\n", 0, m.start()) + 1) for m in _BLOCK.finditer(text)]


def run_cell(code: str, page: Path, line: int, names: dict[str, Any]) -> None:
    lines = code.split("\n")
    options = [x for x in lines if x.startswith(":")]
    shown = "\n".join("" if x in options else x for x in lines)
    # Blank lines in front, so that a traceback names the line of the page.
    exec(compile("\n" * line + shown, str(page), "exec"), names)


def run_session(code: str, page: Path, line: int, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DebugRunner(optionflags=flags).run(test, clear_globs=False)
    names.update(test.globs)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the pages keep the classifier of digits, which is trained once for all of them."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=_SLOW.get(page.name, []))
        for page in PAGES
        if blocks(page)
    ],
)
def test_the_examples_of_a_page_run(page: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    for word, module in _NEEDS.items():
        if f"import {word}" in page.read_text("utf-8") and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if page.name == "fsdp2.md" and not has_fsdp2_on_a_cpu():
        pytest.skip("this torch's fully_shard does not run on a CPU")
    # A tutorial has files beside it; another page may write some.
    monkeypatch.chdir(page.parent if page.parent.name == "tutorials" else tmp_path)
    monkeypatch.syspath_prepend(str(page.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for kind, code, line in blocks(page):
            run = run_session if kind == "pycon" or code.startswith(">>>") else run_cell
            run(code, page, line, names)
    from matplotlib import pyplot

    pyplot.close("all")
    sys.modules.pop("sharded_digits", None)


def test_every_tutorial_has_cells() -> None:
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        assert page.name == "index.md" or blocks(page), f"{page.name} has nothing that runs"
