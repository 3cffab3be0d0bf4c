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
from tests.kernels.fake_gpu import needs_interpreter

import rai_toolbox.functional as F
from rai_toolbox.kernels import _machine, _operators

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("form", [None, "portable"])
def test_a_form(form: str | None, claim: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    with _machine.forced(form):
        claim(dtype)


@needs_interpreter
@pytest.mark.timeout(1200)  # a minute of a core, and many on a busy machine
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


@pytest.mark.parametrize("installed", [False, True])
def test_a_triton_that_is_missing_or_broken_is_told_of_once_and_results_are_the_same(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name} cannot be loaded")

    monkeypatch.setattr(_machine, "HAS_TRITON", installed)
    monkeypatch.setattr(_operators, "_kernel", broken)
    monkeypatch.setattr(_machine, "_unusable", set())
    x = torch.arange(12.0).reshape(3, 4)
    with _machine.forced("triton"):
        with pytest.warns(RuntimeWarning, match="cannot be loaded" if installed else "not installed"):
            first = F.normalize_(x.clone(), 2)
        second = F.normalize_(x.clone(), 2)
    torch.testing.assert_close(first, F.normalize_(x.clone(), 2))
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert torch.equal(first, second)
