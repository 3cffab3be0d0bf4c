"""The benchmark for GPUs: without one it says so and fails; its logic runs on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would measure")
def test_without_a_gpu_it_says_so_in_a_sentence_and_fails() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr == "bench-gpu: this machine has no CUDA device, so nothing was measured.\n"


@pytest.mark.slow
def test_its_whole_logic_runs_on_a_cpu(tmp_path: Path) -> None:
    done = run("--rehearse", "--rounds", "1", "--out", str(tmp_path / "gpu.md"))
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert "no figure here means anything" in table
    for words in ("| L2Projected, -1 |", "**small**", "PGD-2", "| Linf | bfloat16 autocast | by hand | 1.00 |"):
        assert words in table
