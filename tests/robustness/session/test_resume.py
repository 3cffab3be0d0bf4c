"""A run that is ended at any moment goes on to the same figures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rai_toolbox.robustness import InputError
from rai_toolbox.robustness._files import UNFINISHED, atomic_write, prepare_folder
from rai_toolbox.robustness.session._journal import Journal

MODEL = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
"""


def figures(folder):
    content = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in content.items() if key not in ("timings", "environment")}


def command(folder, *words):
    flags = ["--model", "model.py:make", "--data", "data.npz", "--batch-size", "6", "--seed", "1"]
    flags += ["--steps", "6", "--restarts", "2", "--quiet"]
    return [sys.executable, "-m", "rai_toolbox", "evaluate", *flags, "--out", str(folder), *words]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(60, 6)).astype(np.float32), y=rng.integers(0, 3, 60))
    return tmp_path


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_figures_are_those_of_a_run_that_was_not(place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": place, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    assert subprocess.run(command("whole"), **options).returncode == 0
    pieces = len(list((place / "whole").iterdir()))
    out = place / "killed"
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command("killed", "--resume"), **options)
        # The moments are random in what has been done, not in seconds: a busy machine only makes it longer.
        more = rng.choice([0, 0, 1, 1, 2, 3])
        reached = _finished(out) + more
        while process.poll() is None and _finished(out) < reached:
            time.sleep(0.002)
        time.sleep(rng.random() * (2.0 if more == 0 else 0.02))
        process.send_signal(signal.SIGKILL)
        _, message = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, message.decode()
        kills += 1
        assert not (out / "results.json").exists() or json.loads((out / "results.json").read_text())
    final = subprocess.run(command("killed", "--resume"), **options)
    assert final.returncode == 0, final.stderr.decode()
    assert figures(out) == figures(place / "whole")
    assert kills >= 5
    assert len(list(out.iterdir())) == pieces
    assert not (out / UNFINISHED).exists()


def _finished(out: Path) -> int:
    return len(list((out / UNFINISHED).glob("*.npz"))) if (out / UNFINISHED).exists() else 0


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".partial-xyz").write_bytes(b"half")
    prepare_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_piece_is_done_again(tmp_path):
    journal = Journal(tmp_path)
    journal.begin({"seed": 0}, resume=False)
    journal.put("piece-0", {"distance": np.arange(3.0)})
    again = Journal(tmp_path)
    again.begin({"seed": 0}, resume=True)
    assert again.get("piece-0")["distance"].tolist() == [0.0, 1.0, 2.0]
    (tmp_path / UNFINISHED / "piece-0.npz").write_bytes(b"damaged")
    assert Journal(tmp_path).get("piece-0") is None
    (tmp_path / UNFINISHED / "run.json").write_text("{")
    fresh = Journal(tmp_path)
    with pytest.raises(InputError, match="damaged"):
        fresh.begin({"seed": 0}, resume=True)


def test_another_machines_own_folder_is_begun_gone_on_with_or_thrown_away(tmp_path):
    def follow(folder, seed, **options):
        journal = Journal(tmp_path / folder)
        journal.follow({"seed": seed}, **{"resume": False, **options})
        return journal

    leader = Journal(tmp_path / "shared")
    leader.begin({"seed": 1}, resume=False)
    leader.put("piece", {"distance": np.ones(1)})
    assert follow("shared", 1).get("piece") is not None
    assert follow("shared", 1, overwrite=True).get("piece") is not None
    follow("own", 0).put("piece", {"distance": np.zeros(1)})
    with pytest.raises(InputError, match="had another seed"):
        follow("own", 1)
    assert follow("own", 1, overwrite=True).get("piece") is None
    assert follow("own", 1).get("piece") is None
