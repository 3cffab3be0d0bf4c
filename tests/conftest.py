"""What holds for all tests: what hypothesis draws, and which warnings are errors.

It draws the same examples in every run, so that a failure is met again. Others are drawn with
`make test ARGS="--hypothesis-profile=explore"`.
"""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("explore", print_blob=True)
hypothesis.settings.register_profile("same", derandomize=True, print_blob=True)
hypothesis.settings.load_profile("same")

_PINNED = re.search(r"^torch==(\d+)\.(\d+)", (Path(__file__).parents[1] / "constraints.txt").read_text("utf-8"), re.M)


def pytest_configure(config: pytest.Config) -> None:
    """Show what a torch newer than the pinned one deprecates; every other warning is an error."""
    assert _PINNED is not None
    if tuple(map(int, torch.__version__.split(".")[:2])) > tuple(map(int, _PINNED.groups())):
        for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            config.addinivalue_line("filterwarnings", f"default::{category}")
