"""The commands of the README and of the how-to pages, as they are written there, on few samples."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.cli import main

ROOT = Path(__file__).parents[3]
PAGES = ["README.md", "docs/how-to/evaluate.md", "docs/how-to/several-nodes.md"]
BRIEFLY = ["--samples", "12", "--steps", "4", "--restarts", "1", "--no-diagnostics", "--quiet"]


def commands(page: str) -> list[list[str]]:
    """What follows `rai-toolbox` on the page, of one process where torchrun would start several."""
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:\$ |-m )rai[-_]toolbox (.*)", line) for line in lines]
    return [shlex.split(line[1]) for line in found if line and "cuda" not in line[1]]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    assert commands(page)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__"))
    Path("net.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(3, 2)\n")
    np.savez("test.npz", x=np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), y=np.arange(12) % 2)
    for words in commands(page):
        out = Path(words[words.index("--out") + 1]) if "--out" in words else Path("rai-comparison")
        assert main([*words, *(BRIEFLY if words[0] == "evaluate" else [])]) == 0, words
        if words[0] == "evaluate":
            results = json.loads((out / "results.json").read_text())
            assert results["complete"]
            assert results["data"]["evaluated"] == 12
        else:
            assert (out / "comparison.html").exists()


def test_the_readme_has_images_a_table_series_and_a_regression():
    models = [words[words.index("--model") + 1] for words in commands("README.md")]
    assert {"digits", "examples/wine.py:model", "examples/waves.py:model", "examples/diabetes.py:model"} <= set(models)
    assert any("regression" in words for words in commands("README.md"))
