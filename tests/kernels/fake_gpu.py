"""What of a GPU can be had without one: fake tensors of a CUDA build, and Triton's interpreter and assembler."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

NO_TRITON = "Triton is not installed: it comes with CUDA builds of torch"


def _triton() -> tuple[int, ...]:
    """The version of Triton, empty where there is none."""
    if importlib.util.find_spec("triton") is None:
        return ()
    return tuple(map(int, importlib.metadata.version("triton").split("+")[0].split(".")[:2]))


def _why_no_fake_tensors() -> str:
    if torch.version.cuda is None:
        return "a CPU build of torch: `make test-torch TORCH=2.14.1` has a CUDA build"
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").copy_(torch.empty(1, device="cuda"))
    except Exception as error:  # up to torch 2.9 at least
        return f"fake tensors of this torch ask for a GPU's driver: {str(error).splitlines()[0]}"
    return ""


def _why_no_interpreter() -> str:
    if not _triton():
        return NO_TRITON
    numpy = tuple(map(int, np.__version__.split(".")[:2]))
    # It converts arrays of one entry and one dimension to integers.
    fails = _triton() < (3, 6) and numpy >= (2, 4)
    if _triton() < (3, 3):
        return "the interpreter of Triton 3.2 has no masks of bits"
    return "the interpreter of Triton before 3.6 fails with numpy from 2.4" if fails else ""


def _why_no_assembler() -> str:
    if not _triton():
        return NO_TRITON
    return "registers are counted with the assembler of Triton 3.8 or newer" if _triton() < (3, 8) else ""


needs_fake_tensors = pytest.mark.skipif(bool(_why_no_fake_tensors()), reason=_why_no_fake_tensors())
needs_interpreter = pytest.mark.skipif(bool(_why_no_interpreter()), reason=_why_no_interpreter())
needs_assembler = pytest.mark.skipif(bool(_why_no_assembler()), reason=_why_no_assembler())
