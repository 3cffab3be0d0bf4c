"""One list of claims, on each form that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.kernels.claims import CLAIMS

from rai_toolbox.kernels import _machine

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("form", [None, "portable"])
def test_a_form(form: str | None, claim: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    with _machine.forced(form):
        claim(dtype)


@pytest.mark.skipif(_machine.triton is None, reason="Triton is not installed: it comes with CUDA builds of torch")
def test_the_kernels_hold_the_claims_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "tests/kernels/in_the_interpreter.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
