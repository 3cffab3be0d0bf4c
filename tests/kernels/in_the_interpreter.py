"""The claims on Triton's kernels, which its interpreter runs on tensors of a CPU; `test_forms.py` starts this."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kernels.claims import CLAIMS

from rai_toolbox.kernels import _machine


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_kernel(claim: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    with _machine.forced("triton"):
        claim(dtype)
    assert not _machine._unusable
