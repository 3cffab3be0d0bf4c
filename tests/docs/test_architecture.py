"""The page on the architecture names every file of the package, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_architecture_page_names_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text("utf-8")
    source = ROOT / "src" / "rai_toolbox"
    sections = [part for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:] if not part.startswith("Words\n")]
    for section in sections:
        folder = source / section.split(":")[0] if ":" in section.split("\n")[0] else source
        named = set(
            re.findall(r"`([\w/]+\.py)`", "\n".join(line for line in section.split("\n") if line.startswith("|")))
        )
        files = folder.glob("*.py") if folder == source else folder.rglob("*.py")
        there = {file.relative_to(folder).as_posix() for file in files if file.name != "__init__.py"}
        assert named == there, f"{folder.name}: {sorted(named ^ there)}"
    assert len(sections) == 6
