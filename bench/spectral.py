"""What a step of Muon as a chain costs beside `torch.optim.Muon`: the ratio of medians of interleaved repeats.

python bench/spectral.py
torchrun --nproc-per-node 2 bench/spectral.py  # parameters sharded by rows: times, and collectives of a step
"""

from __future__ import annotations

import os
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist

from rai_toolbox.optim import AveragedGradientOptim, ChainedParamTransformingOptimizer, OrthogonalizedGradientOptim

CASES = [(48, 32), (48, 64), (24, 128), (12, 256)]


def matrices(count: int, size: int) -> list[torch.Tensor]:
    params = [torch.randn(size, size).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def muon(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.95, mix=0.95),
        OrthogonalizedGradientOptim,
        params=params,
        lr=1e-6,
        weight_decay=0.1,
        param_ndim=2,
    )


def main(seconds: float = 4.0) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for count, size in CASES:
        ours, theirs = muon(matrices(count, size)), torch.optim.Muon(matrices(count, size), lr=1e-6)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["ours"]) < 5:
            for name, optim in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                optim.step()
                times[name].append(time.perf_counter() - start)
        ratio = statistics.median(times["ours"][1:]) / statistics.median(times["theirs"][1:])
        print(f"{count} matrices of {size} x {size}: {ratio:.2f} of torch.optim.Muon")


def main_on_ranks(count: int = 24, size: int = 64, steps: int = 6) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, build in (("chain", muon), ("torch.optim.Muon", partial(torch.optim.Muon, lr=1e-6))):
        params = [distribute_tensor(p.detach(), mesh, [Shard(0)]).requires_grad_() for p in matrices(count, size)]
        optim, times = build(params), []
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn_like(p)
            dist.barrier()
            start = time.perf_counter()
            with CommDebugMode() as seen:
                optim.step()
            times.append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            print(
                f"{name}, {count} matrices of {size} x {size} on {dist.get_world_size()} ranks: "
                f"{seen.get_total_counts()} collectives, {1e3 * statistics.median(times[1:]):.1f} ms"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main_on_ranks() if "RANK" in os.environ else main()
