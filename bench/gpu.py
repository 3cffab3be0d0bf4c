"""What our steps and solvers cost on a GPU: times by CUDA events, memory, and whether a step ever waits for the device.

    make bench-gpu                           # everything, into bench-results/gpu.md
    python bench/gpu.py --case images        # a part of the steps
    python bench/gpu.py --older DIR          # beside the package in DIR (pip install --target DIR ...)
    python bench/gpu.py --rehearse           # the whole logic on a CPU, with small tensors: its figures mean nothing

For each optimizer and case: the median time as a ratio to plain SGD (foreach, and fused) of the same tensors, the steps
taken in turn; the bytes that a step has to move over its time, as a share of what a copy of a large tensor reaches on
this card; the peak of memory beyond the tensors; that `torch.cuda.set_sync_debug_mode("error")` finds no wait; and that
a step captured in a CUDA graph and replayed does what a step does. Then 40 steps of PGD on a ResNet-18 at batch 128, in
float32 and under bfloat16 autocast, beside a loop by hand and other libraries where they are installed; and
`rai-toolbox evaluate` on the digits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradient_ascent as ascent
import optimizers as steps
import torch
from solver_peers import installed
from torch import Tensor, nn

from rai_toolbox import optim

SMALL = {"images": [(4, 3, 8, 8)], "small": [(4, 4), (4,)] * 3}
LR = 1e-9


def copy_bandwidth(device: str, numel: int) -> float:
    """Bytes a millisecond of a copy from one large tensor to another."""
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    times = [steps._timed(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.numel() * source.element_size() / min(times)


@contextlib.contextmanager
def waits_raise(device: str) -> Iterator[None]:
    """Raise where something waits for the device."""
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")


def never_waits(step: Callable[[], Any], device: str) -> str:
    """Whether a step never waits for the device: "yes", or what says that it does."""
    if device == "cpu":
        return "-"
    try:
        with waits_raise(device):
            step()
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0][:60]}"
    return "yes"


def is_captured(row: steps.Row, params: list[Tensor], device: str) -> str:
    """Whether a step in a CUDA graph, replayed, changes parameters as a step does."""
    if device == "cpu":
        return "-"
    try:
        mine, theirs = ([_like(p) for p in params] for _ in range(2))
        captured, plain = (getattr(optim, row.name)(ps, lr=0.1, **row.keywords) for ps in (mine, theirs))
        for optimizer in (captured, plain):
            optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        graph.replay()
        plain.step()
        torch.cuda.synchronize()
        same = all(torch.allclose(a, b) for a, b in zip(mine, theirs, strict=True))
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0][:60]}"
    return "yes" if same else "no: other values"


def _like(p: Tensor) -> Tensor:
    fresh = p.detach().clone().requires_grad_()
    fresh.grad = None if p.grad is None else p.grad.clone()
    return fresh


def peak(step: Callable[[], Any], device: str, largest: int) -> float:
    """The peak of memory of a step beyond what was there, in units of the largest parameter."""
    if device == "cpu":
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / largest


def steps_of(case: str, shapes: list[tuple[int, ...]], device: str, rounds: int, full: float) -> list[str]:
    """The rows of the table of one case."""
    params = steps.parameters(shapes, device)
    fresh = [p.grad.clone() for p in params if p.grad is not None]
    sizes = [p.numel() * p.element_size() for p in params]
    lines = [
        f"**{case}**: {len(shapes)} tensors, {sum(sizes) / 2**20:,.1f} MiB",
        "",
        "| optimizer | of SGD(foreach) | of SGD(fused) | of the card's bandwidth | peak | never waits | in a graph |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    sgd = {kind: torch.optim.SGD(params, lr=LR, **{kind: True}).step for kind in ("foreach", "fused")}
    for label, row in steps.ROWS.items():
        if len(shapes) > 10 and row.selects:
            continue
        step = getattr(optim, row.name)(params, lr=LR, **row.keywords).step
        measure = steps.measured_on_fresh_data if row.selects else steps.measured
        times = measure({**sgd, "ours": step}, params, fresh, rounds, device)
        median = {name: statistics.median(values) for name, values in times.items()}
        share = row.bound * 3 * sum(sizes) / median["ours"] / full
        lines.append(
            f"| {label} | {median['ours'] / median['foreach']:.2f} | {median['ours'] / median['fused']:.2f} "
            f"| {share:.0%} | {peak(step, device, max(sizes)):.2f} | {never_waits(step, device)} "
            f"| {is_captured(row, params, device)} |"
        )
    return [*lines, ""]


def attacks(model: nn.Module, x: Tensor, y: Tensor, norm: str, count: int) -> dict[str, Callable[[], Any]]:
    """40 steps of PGD, ours, by hand and by others."""
    epsilon, lr = ascent.EPSILON, ascent.LR
    runs: dict[str, Callable[[], Any]] = {
        "by hand": lambda: ascent.loop(model, x, y, count, norm),
        "ours": lambda: ascent.solve(model, x, y, count, norm),
    }
    if (peer := installed("torchattacks")) is not None:
        kind = peer.PGD if norm == "Linf" else peer.PGDL2
        runs["torchattacks"] = lambda: kind(model, eps=epsilon, alpha=lr, steps=count)(x, y)
    if (peer := installed("foolbox")) is not None:
        name = {"Linf": "LinfPGD", "L2": "L2PGD"}[norm]
        attack = getattr(peer.attacks, name)(abs_stepsize=lr, steps=count, random_start=False)
        wrapped = peer.PyTorchModel(model, bounds=(0, 1), device=x.device)
        runs["foolbox"] = lambda: attack(wrapped, x, y, epsilons=epsilon)
    if (peer := installed("adv_lib.attacks")) is not None:
        order = {"Linf": float("inf"), "L2": 2}[norm]
        runs["adv-lib's APGD"] = lambda: peer.apgd(model, x, y, eps=epsilon, norm=order, n_iter=count, n_restarts=1)
    return runs


def pgd(device: str, rounds: int, batch: int, size: int, count: int) -> list[str]:
    """The table of PGD, as ratios to the loop by hand."""
    torch.manual_seed(0)
    model = ascent.resnet18().to(device).eval().requires_grad_(False)
    x, y = torch.rand(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    lines = [
        f"**PGD-{count}**, ResNet-18, batch {batch}, {size} × {size}: time of the loop by hand",
        "",
        "| norm | dtype | who | ratio |",
        "| --- | --- | --- | --- |",
    ]
    kind = torch.device(device).type
    for norm in ("Linf", "L2"):
        for name, autocast in (("float32", False), ("bfloat16 autocast", True)):
            times: dict[str, list[float]] = {}
            with torch.autocast(kind, torch.bfloat16, enabled=autocast):
                runs = attacks(copy.deepcopy(model), x, y, norm, count)
                for _ in range(rounds + 1):
                    for who, run in runs.items():
                        times.setdefault(who, []).append(steps._timed(run, device))
            median = {who: statistics.median(values[1:]) for who, values in times.items()}
            lines += [f"| {norm} | {name} | {who} | {t / median['by hand']:.2f} |" for who, t in median.items()]
    return [*lines, ""]


def digits(device: str) -> list[str]:
    """That the command evaluates the digits on the device."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rai_toolbox", "evaluate", "--model", "digits", "--data", "digits"]
        command += ["--device", device, "--samples", "50", "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()[-1:] or [""]
    return [f"`rai-toolbox evaluate --device {device}` on the digits: exit code {done.returncode}. {said[0]}", ""]


def main() -> int:
    """Measure, print the table, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=steps.CASES, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--older", type=Path, help="a folder with another version of the package")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, with small tensors; the figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu.md"))
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        print("bench-gpu: this machine has no CUDA device, so nothing was measured.", file=sys.stderr)
        return 1
    device = "cpu" if args.rehearse else "cuda"
    card = "a rehearsal on a CPU: no figure here means anything" if args.rehearse else torch.cuda.get_device_name()
    cases = SMALL if args.rehearse else {name: steps.CASES[name] for name in args.case or steps.CASES}
    if args.rehearse:
        steps._LEAST_MS = 0.0
    lines = [f"{card}, torch {torch.__version__}.", ""]
    full = copy_bandwidth(device, 2**16 if args.rehearse else 2**28)
    for case, shapes in cases.items():
        lines += steps_of(case, shapes, device, args.rounds, full)
    if args.older:
        older = steps.beside_older(args.older, ["--device", device, "--rounds", str(args.rounds)])
        lines += [
            "**The older package**, of its fastest SGD:",
            "",
            "| case | optimizer | ratio |",
            "| --- | --- | --- |",
        ]
        for case, figures in older.items():
            lines += [f"| {case} | {label} | {row['SGD']['ratio']:.2f} |" for label, row in figures["rows"].items()]
        lines.append("")
    lines += pgd(device, 1, 2, 16, 2) if args.rehearse else pgd(device, 3, 128, 64, 40)
    if not args.rehearse:
        lines += digits(device)
    text = "\n".join(lines)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
