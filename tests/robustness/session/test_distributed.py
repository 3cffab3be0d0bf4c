"""Several processes: the same result, and an end that can be gone on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = """
import os
import torch
from torch import nn

class Dies(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = make(), 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 30 and os.environ.get("RANK") == "1" and os.environ.get("DIE"):
            os._exit(7)
        return self.net(x)

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

def dies():
    return Dies()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("several")
    (place / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(place / "data.npz", x=rng.normal(size=(50, 6)).astype(np.float32), y=rng.integers(0, 3, 50))
    return place


def run(place, processes, out, *words, model="model.py:make", **environment):
    flags = f"evaluate --model {model} --data data.npz --batch-size 8 --steps 6 --restarts 2 --quiet".split()
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [*launch, "rai_toolbox", *flags, "--out", out, *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def figures(folder):
    content = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in content.items() if key not in ("timings", "environment")}


def test_two_and_three_processes_give_exactly_the_result_of_one(place):
    for processes in (1, 2, 3):
        done = run(place, processes, f"of{processes}", "--norm", "l2", "--norm", "linf")
        assert done.returncode == 0, done.stderr
    assert figures(place / "of2") == figures(place / "of1")
    assert figures(place / "of3") == figures(place / "of1")


def test_a_rank_that_dies_ends_the_run_and_leaves_what_can_be_gone_on_from(place):
    done = run(place, 2, "dead", model="model.py:dies", DIE="1")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr
    assert "process" in told[0]
    assert told[0].endswith("finished batches are kept, run again with --resume")
    assert not (place / "dead" / "results.json").exists()
    assert list((place / "dead" / "unfinished").glob("*.npz"))
    again = run(place, 1, "dead", "--resume", model="model.py:dies")
    assert again.returncode == 0, again.stderr
    whole = run(place, 1, "alive", model="model.py:dies")
    assert whole.returncode == 0, whole.stderr
    assert figures(place / "dead") == figures(place / "alive")


def test_bad_input_is_told_once(place):
    done = run(place, 2, "bad", "--epsilons", "-1")
    assert done.returncode != 0
    assert done.stderr.count("error: --epsilons must be") == 1
