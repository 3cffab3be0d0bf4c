"""Messages that ask for an extra name one that there is, and the command that installs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rai_toolbox._extras import install_command

ROOT = Path(__file__).parents[1]
SOURCES = "".join(file.read_text("utf-8") for file in sorted((ROOT / "src").rglob("*.py")))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_extra_that_a_message_asks_for_exists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    asked = set(re.findall(r"install_command\(['\"](\w+)['\"]\)", SOURCES))
    assert asked >= {"cli", "demo", "onnx"}
    assert asked <= extras.keys()


def test_no_message_names_a_distribution_of_an_index() -> None:
    # On an index the name is that of the older package.
    assert "rai-toolbox[" not in SOURCES
    assert "pip install '.[cli]'" in install_command("cli")
    assert "pip install '.[cli,demo]'" in (ROOT / "README.md").read_text("utf-8")
