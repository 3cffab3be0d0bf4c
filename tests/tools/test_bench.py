"""The benchmark of the optimizers, by case."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_measures_the_cases_that_are_named_and_nothing_else():
    words = ["make", "--always-make", "--dry-run", "bench"]
    one, whole = (
        subprocess.run([*words, *case], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for case in (["CASE=images rows"], [])
    )
    assert "bench/optimizers.py  --case images --case rows\n" in one
    assert "growth.py" not in one
    assert "growth.py" in whole


def test_a_case_that_is_none_is_answered_with_the_list():
    words = [sys.executable, "bench/optimizers.py", "--case", "pictures"]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert all(case in told.stderr for case in ("'pictures'", "images", "resnet50", "small", "rows"))
