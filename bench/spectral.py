"""What a step of Muon as a chain costs beside `torch.optim.Muon`: the ratio of medians of interleaved repeats."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from rai_toolbox.optim import AveragedGradientOptim, ChainedParamTransformingOptimizer, OrthogonalizedGradientOptim

CASES = [(48, 32), (48, 64), (24, 128), (12, 256)]


def matrices(count: int, size: int) -> list[torch.Tensor]:
    params = [torch.randn(size, size).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def main(seconds: float = 4.0) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for count, size in CASES:
        ours = ChainedParamTransformingOptimizer(
            partial(AveragedGradientOptim, decay=0.95, mix=0.95),
            OrthogonalizedGradientOptim,
            params=matrices(count, size),
            lr=1e-6,
            weight_decay=0.1,
            param_ndim=2,
        )
        theirs = torch.optim.Muon(matrices(count, size), lr=1e-6)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["ours"]) < 5:
            for name, optim in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                optim.step()
                times[name].append(time.perf_counter() - start)
        ratio = statistics.median(times["ours"][1:]) / statistics.median(times["theirs"][1:])
        print(f"{count} matrices of {size} x {size}: {ratio:.2f} of torch.optim.Muon")


if __name__ == "__main__":
    main()
