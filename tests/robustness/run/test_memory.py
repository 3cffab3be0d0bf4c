"""Memory does not grow with the number of samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("memory_program.py")


def peak(count: int, place: Path) -> float:
    """MiB that an evaluation of so many samples of 3x32x32 takes above what was there before it."""
    place.mkdir()
    words = [sys.executable, str(PROGRAM), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (place / "data.npz").unlink()
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_memory_that_a_sample_adds_leaves_a_hundred_thousand_under_a_gibibyte(tmp_path):
    few, many = peak(2000, tmp_path / "few"), peak(8000, tmp_path / "many")
    print(f"{few:.0f} MiB for 2,000, {many:.0f} MiB for 8,000")
    # Their inputs alone would be 70 MiB more; the allocator makes one peak differ from another by some 20.
    assert many - few < 50
    assert many + 92_000 / 6000 * max(0, many - few) < 1024
