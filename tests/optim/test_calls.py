"""How many functions of ours one warm step calls, and in how many files."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

import rai_toolbox
from rai_toolbox import optim as ro

ROOT = os.path.dirname(rai_toolbox.__file__)


def calls_of_a_warm_step(optim: Any) -> Counter[str]:
    """The calls of a step by file; those of `functional` and `kernels` are the arithmetic."""
    calls: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            calls[os.path.relpath(frame.f_code.co_filename, ROOT)] += 1

    for _ in range(3):
        optim.step()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        optim.step()
    finally:
        sys.setprofile(before)
    return calls


def with_gradient() -> torch.Tensor:
    x = torch.randn(8, 3, 8, 8, requires_grad=True)
    x.grad = torch.randn(8, 3, 8, 8)
    return x


def l2_projected() -> Any:
    return ro.L2ProjectedOptim([with_gradient()], epsilon=1.0, lr=0.1)


def chain_of_two() -> Any:
    links = partial(ro.TopQGradientOptimizer, q=0.5), partial(ro.L2ProjectedOptim, epsilon=1.0)
    return ro.ChainedParamTransformingOptimizer(*links, params=[with_gradient()], InnerOpt=torch.optim.Adam)


# Before: 40 calls in 6 files of `optim`, and 124 in 10.
@pytest.mark.parametrize(("build", "most", "files"), [(l2_projected, 20, 6), (chain_of_two, 34, 6)])
def test_a_warm_step_takes_a_short_way_to_the_arithmetic(build: Any, most: int, files: int) -> None:
    above = {file: n for file, n in calls_of_a_warm_step(build()).items() if file.startswith("optim")}
    assert sum(above.values()) <= most, above
    assert len(above) <= files, above


def test_a_step_of_frank_wolfe_makes_no_call_of_ours_for_each_parameter() -> None:
    def calls(number: int) -> int:
        params = [torch.zeros(2, 3, requires_grad=True) for _ in range(number)]
        for p in params:
            p.grad = torch.ones(2, 3)
        return calls_of_a_warm_step(ro.FrankWolfe(params)).total()

    assert calls(40) == calls(4)
