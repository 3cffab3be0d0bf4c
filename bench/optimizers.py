"""What a step costs: every optimizer, as a ratio to the fastest plain SGD step of the same tensors in the same process.

    python bench/optimizers.py                           # the table, and bench-results/optimizers.json
    python bench/optimizers.py --case images --only L2   # a part of it
    python bench/optimizers.py --older DIR               # beside the package in DIR (pip install --target DIR ...)
    python bench/optimizers.py --compile                 # compiled too, by optim.compile()
    python bench/optimizers.py --busy 2                  # beside two processes that keep a core busy each

A round steps every candidate once, in turn; a figure is the median of the rounds (least to most), divided by the median
of the fastest SGD step (loop, foreach or fused). `total` is the same of the sums: beside busy processes a median says
which step fits a time slice of the system, the sum what the steps cost. Rounds go on for half a second at least, and
every case has a process of its own: what an earlier one left of the caches and the heap is worth up to a third of a
step. With `--adam` the same around Adam, as a ratio to the fastest Adam step. `bound` is the least memory traffic, as a
ratio to SGD's (read g, read p, write p): the gradient is read and written, the parameter too, once each if a datum fits
the cache, and again where a norm of the whole tensor must be known first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rai_toolbox
from rai_toolbox import optim

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


_LEAST_MS = 500.0


class Row(NamedTuple):
    """An optimizer of the table."""

    name: str
    keywords: dict[str, Any]
    bound: float  # of the traffic, in units of SGD's; see above
    selects: bool = False  # whether its time depends on the values, so that each step must find fresh ones


ROWS = {
    "L1Normed, -1": Row("L1NormedGradientOptim", {}, 4 / 3),
    "L2Normed, -1": Row("L2NormedGradientOptim", {}, 4 / 3),
    "L2Projected, -1": Row("L2ProjectedOptim", {"epsilon": 1.0}, 4 / 3),
    "L1Normed, None": Row("L1NormedGradientOptim", {"param_ndim": None}, 5 / 3),
    "L2Normed, None": Row("L2NormedGradientOptim", {"param_ndim": None}, 5 / 3),
    "L2Projected, None": Row("L2ProjectedOptim", {"epsilon": 1.0, "param_ndim": None}, 7 / 3),
    "Signed": Row("SignedGradientOptim", {}, 4 / 3),
    "LinfProjected": Row("LinfProjectedOptim", {"epsilon": 1.0}, 4 / 3),
    "ClampedGradient": Row("ClampedGradientOptimizer", {"clamp_min": -1.0, "clamp_max": 1.0}, 4 / 3),
    "ClampedParameter": Row("ClampedParameterOptimizer", {"clamp_min": -1.0, "clamp_max": 1.0}, 1.0),
    "L2Ball": Row("L2BallOptim", {"epsilon": 1.0}, 1.0),
    "TopQ, q=0.9": Row("TopQGradientOptimizer", {"q": 0.9}, 4 / 3, selects=True),
    "L1qNormed, q=0.9": Row("L1qNormedGradientOptim", {"q": 0.9}, 4 / 3, selects=True),
    "L1Projected": Row("L1ProjectedOptim", {"epsilon": 1.0}, 4 / 3, selects=True),
    "L1Ball": Row("L1BallOptim", {"epsilon": 1.0}, 1.0, selects=True),
    "Simplex": Row("SimplexOptim", {}, 1.0, selects=True),
}


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[Tensor]:
    """Random parameters with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, device=device, generator=generator).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device, generator=generator)
    return params


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


def run_case(name: str, rounds: int, device: str, only: str, adam: bool, compiled: bool) -> dict[str, Any]:
    """Measure every optimizer of the importable package on one case."""
    shapes = CASES[name]
    params = parameters(shapes, device)
    fresh = [p.grad.clone() for p in params if p.grad is not None]
    result: dict[str, Any] = {"tensors": len(shapes), "entries": sum(map(math.prod, shapes)), "rows": {}}
    for label, row in ROWS.items():
        if only not in label or not hasattr(optim, row.name) or (name == "small" and row.selects):
            continue
        build = functools.partial(getattr(optim, row.name), params, **row.keywords)
        figures: dict[str, Any] = {"bound": row.bound}
        for inner in (torch.optim.SGD, torch.optim.Adam)[: 1 + adam]:
            lr = 1e-9
            plain: dict[str, Step] = {
                f"{inner.__name__} {kind}": inner(params, lr=lr, **{"foreach": False, "fused": False, kind: True}).step
                if kind != "loop"
                else inner(params, lr=lr, foreach=False).step
                for kind in ("loop", "foreach", "fused")
            }
            steps = plain | {"ours": build(InnerOpt=inner, lr=lr).step}
            seconds = 0.0
            if compiled:
                steps["compiled"], seconds = _compiled(build(InnerOpt=inner, lr=lr))
            measure = measured_on_fresh_data if row.selects else measured
            times = measure(steps, params, fresh, rounds, device)
            medians = {k: statistics.median(v) for k, v in times.items()}
            floor = min(medians[k] for k in plain)
            figures[inner.__name__] = {
                "plain ms": floor,
                "ms": medians["ours"],
                "ratio": medians["ours"] / floor,
                "least": min(times["ours"]) / floor,
                "most": max(times["ours"]) / floor,
                "total": sum(times["ours"]) / min(sum(times[k]) for k in plain),
            }
            if compiled:
                figures[inner.__name__] |= {"compiled": medians["compiled"] / floor, "compiling s": seconds}
        result["rows"][label] = figures
        print(f"{name:9} {label:18}" + _cells(figures), flush=True)
    return result


def _cells(figures: dict[str, Any]) -> str:
    cells = ""
    for inner in ("SGD", "Adam"):
        if inner in figures:
            f = figures[inner]
            cells += f"  {inner} {f['plain ms']:8.3f} ms  {f['ratio']:6.2f} ({f['least']:.2f} to {f['most']:.2f})"
            cells += f"  total {f['total']:.2f}"
            if "compiled" in f:
                cells += f"  compiled {f['compiled']:6.2f} (after {f['compiling s']:.0f} s)"
    return cells + f"   bound {figures['bound']:.2f}"


def _compiled(optimizer: Any) -> tuple[Step, float]:
    """A compiled step, and the seconds that compiling took."""
    optimizer.compile()
    optimizer.step()
    start = time.perf_counter()
    optimizer.step()
    return optimizer.step, time.perf_counter() - start


def measured(
    steps: dict[str, Step], params: list[Tensor], fresh: list[Tensor], rounds: int, device: str
) -> dict[str, list[float]]:
    """The times of every step, in ms, taken in turn."""
    _restore(params, fresh)
    return _in_turn(steps, rounds, device, lambda: None)


def measured_on_fresh_data(
    steps: dict[str, Step], params: list[Tensor], fresh: list[Tensor], rounds: int, device: str
) -> dict[str, list[float]]:
    """As `measured`, each step on the same data: one that selects or projects would find its work done already."""
    return _in_turn(steps, rounds, device, lambda: _restore(params, fresh))


def _in_turn(steps: dict[str, Step], rounds: int, device: str, prepare: Step) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    done = spent = 0.0
    while done < rounds + 2 or spent < _LEAST_MS:
        for name, step in steps.items():
            prepare()
            elapsed = _timed(step, device)
            spent += elapsed
            if done >= 2:  # the first rounds warm up
                times[name].append(elapsed)
        done += 1
    return times


def _restore(params: list[Tensor], fresh: list[Tensor]) -> None:
    with torch.no_grad():
        for p, g in zip(params, fresh, strict=True):
            p.copy_(g)
            p.grad.copy_(g)  # type: ignore[union-attr]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside_older(older: Path, arguments: list[str]) -> dict[str, Any]:
    """The same table for the package in the folder `older`, measured by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "older.json"
        command = [sys.executable, "-W", "ignore", __file__, *arguments, "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(older)})
        return json.loads(out.read_text())["cases"]


def as_markdown(results: dict[str, Any]) -> str:
    """The ratios as a table for the documentation."""
    older = results.get("older", {})
    lines = [f"{results['setting']}.", ""]
    for case, figures in results["cases"].items():
        lines += [
            f"**{case}**: {figures['tensors']} tensors, {figures['entries']:,} entries",
            "",
            "| optimizer | ratio to SGD (least to most) | traffic bound |" + (" older package |" if older else ""),
            "| --- | --- | --- |" + (" --- |" if older else ""),
        ]
        for label, row in figures["rows"].items():
            sgd = row["SGD"]
            line = f"| {label} | {sgd['ratio']:.2f} ({sgd['least']:.2f} to {sgd['most']:.2f}) | {row['bound']:.2f} |"
            if older:
                theirs = older.get(case, {}).get("rows", {}).get(label)
                line += f" {theirs['SGD']['ratio']:.2f} |" if theirs else " |"
            lines.append(line)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adam", action="store_true", help="around Adam too")
    parser.add_argument("--compile", action="store_true", help="compiled too: seconds to minutes for each row")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="beside N processes that keep a core busy each"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--older", type=Path, help="a folder with another version of the package")
    parser.add_argument("--out", type=Path, default=Path("bench-results/optimizers.json"))
    args = parser.parse_args()
    setting = f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads"
    if args.busy:
        setting += f", beside {args.busy} busy process{'es' * (args.busy > 1)}"
    print(f"{setting}, package {getattr(rai_toolbox, '__version__', 'unknown')}; ratios to the fastest plain step")
    names = args.case or list(CASES)
    with busy_processes(args.busy), multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measure = functools.partial(
            run_case, rounds=args.rounds, device=args.device, only=args.only, adam=args.adam, compiled=args.compile
        )
        cases = dict(zip(names, pool.map(measure, names, chunksize=1), strict=True))
    results: dict[str, Any] = {"setting": setting, "cases": cases}
    if args.older:
        picked = [word for case in args.case or [] for word in ("--case", case)]
        results["older"] = beside_older(
            args.older,
            [*picked, "--only", args.only, "--rounds", "5", "--device", args.device, "--busy", str(args.busy)],
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(as_markdown(results))


if __name__ == "__main__":
    main()
