"""What a step costs: every optimizer, as a ratio to the fastest plain SGD step of the same tensors in the same process.

    python bench/optimizers.py                       # the table, and bench-results/optimizers.json
    python bench/optimizers.py --case images --rounds 15
    python bench/optimizers.py --growth              # how cost grows with the number and the size of tensors

A round steps every candidate once, in turn; a row is the median of the rounds (least to most), divided by the median of
the fastest of SGD's own steps (loop, foreach, fused). `bound` is the ratio of the bytes that must move: g, p are read
and written by the transform and the update, against SGD's two reads and one write.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rai_toolbox import optim as ro

Step = Callable[[], Any]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters (He et al. 2016; 25.6 million entries)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convs.append((4 * width, width_in, 1, 1))
            for conv in convs:
                shapes += [conv, conv[:1], conv[:1]]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


CASES: dict[str, list[tuple[int, ...]]] = {
    "images": [(256, 3, 224, 224)],
    "resnet50": resnet50_shapes(),
    "small": [shape for _ in range(200) for shape in ((32, 32), (32,))],
    "rows": [(128, 3072)],
}


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Every class of the package that wraps SGD, by the name of its row."""
    rows: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for pn in (-1, None):
        rows |= {
            f"L1Normed, {pn}": functools.partial(ro.L1NormedGradientOptim, param_ndim=pn),
            f"L2Normed, {pn}": functools.partial(ro.L2NormedGradientOptim, param_ndim=pn),
            f"L2Projected, {pn}": functools.partial(ro.L2ProjectedOptim, epsilon=1.0, param_ndim=pn),
        }
    return rows | {
        "Signed": ro.SignedGradientOptim,
        "LinfProjected": functools.partial(ro.LinfProjectedOptim, epsilon=1.0),
        "ClampedGradient": functools.partial(ro.ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=1.0),
        "ClampedParameter": functools.partial(ro.ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0),
        "TopQ, q=0.9": functools.partial(ro.TopQGradientOptimizer, q=0.9),
        "L1qNormed, q=0.9": functools.partial(ro.L1qNormedGradientOptim, q=0.9),
        "L1Projected": functools.partial(ro.L1ProjectedOptim, epsilon=1.0),
        "L2Ball": functools.partial(ro.L2BallOptim, epsilon=1.0),
    }


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[Tensor]:
    """Random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, device=device, generator=generator).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device, generator=generator)
    return params


def measured(steps: dict[str, Step], rounds: int, device: str, seconds: float = 20.0) -> dict[str, list[float]]:
    """The times of every step, in ms, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    began = time.perf_counter()
    for done in range(rounds):
        for name, step in steps.items():
            times[name].append(_timed(step, device))
        if done >= 4 and time.perf_counter() - began > seconds:
            break
    return times


def _timed(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    step()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def refreshed(step: Step, params: list[Tensor], fresh: list[Tensor], outside: bool) -> Step:
    """The step, on gradients (and parameters outside the ball) as they were: selection depends on the values."""

    def restore() -> None:
        for p, g in zip(params, fresh, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
            if outside:
                p.data.copy_(g)

    restore()
    return step


def run_case(name: str, rounds: int, device: str, only: str | None, fuse: bool) -> dict[str, Any]:
    """Measure every optimizer on one case."""
    shapes = CASES[name]
    params = parameters(shapes, device)
    fresh = [p.grad.clone() for p in params if p.grad is not None]
    variants = {"SGD loop": {"foreach": False}, "SGD foreach": {"foreach": True}, "SGD fused": {"fused": True}}
    baseline: dict[str, Step] = {k: torch.optim.SGD(params, lr=1e-9, **kw).step for k, kw in variants.items()}
    result: dict[str, Any] = {"tensors": len(shapes), "entries": sum(map(math.prod, shapes)), "rows": {}}
    for row, build in optimizers().items():
        if only and only not in row:
            continue
        if name == "small" and row.startswith(("TopQ", "L1q", "L1Projected")):
            continue
        ours = build(params, InnerOpt=torch.optim.SGD, lr=1e-9)
        steps: dict[str, Step] = {"as it comes": ours.step}
        if fuse and isinstance(ours, ro.ParamTransformingOptimizer):
            fused = build(params, InnerOpt=torch.optim.SGD, lr=1e-9)
            fused.fuse()  # type: ignore[attr-defined]
            steps["fused"] = fused.step
        data_matters = row.startswith(("TopQ", "L1q", "L1Projected"))
        times: dict[str, list[float]] = {}
        for batch in range(3 if data_matters else 1):
            for p, g in zip(params, fresh, strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
                p.data.copy_(g)
            if data_matters:  # each step on data as they came: what a step selects or projects it would find done
                part = _measured_on_fresh_data(baseline | steps, params, fresh, max(3, rounds // 3), device)
            else:
                part = measured(baseline | steps, rounds, device)
            for k, v in part.items():
                times.setdefault(k, []).extend(v)
        medians = {k: statistics.median(v) for k, v in times.items()}
        floor = min(medians[k] for k in baseline)
        result["rows"][row] = {
            k: {
                "ratio": medians[k] / floor,
                "least": min(times[k]) / floor,
                "most": max(times[k]) / floor,
                "ms": medians[k],
            }
            for k in steps
        }
        result["rows"][row]["SGD ms"] = floor
        print_row(name, row, result["rows"][row], steps)
    return result


def _measured_on_fresh_data(
    steps: dict[str, Step], params: list[Tensor], fresh: list[Tensor], rounds: int, device: str
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(rounds + 1):
        for name, step in steps.items():
            for p, g in zip(params, fresh, strict=True):
                p.grad.copy_(g)  # type: ignore[union-attr]
                p.data.copy_(g)
            elapsed = _timed(step, device)
            if done:  # the first round warms up
                times[name].append(elapsed)
    return times


def print_row(case: str, row: str, figures: dict[str, Any], steps: dict[str, Step]) -> None:
    """One line of the table."""
    cells = [f"{figures[k]['ratio']:6.2f} ({figures[k]['least']:.2f} to {figures[k]['most']:.2f})" for k in steps]
    print(f"{case:10} {row:20} SGD {figures['SGD ms']:8.3f} ms   " + "   ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-results/optimizers.json"))
    args = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cases": {},
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios to the fastest SGD step, as it comes / fused")
    for case in args.case or CASES:
        results["cases"][case] = run_case(case, args.rounds, args.device, args.only, not args.no_fuse)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
