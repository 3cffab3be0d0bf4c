"""How the cost of a step grows with the number and the size of tensors: bench-results/growth.json and a plot.

    python bench/growth.py [--plot docs/_static/growth.svg]

Each point is the median of interleaved steps of one optimizer and of the fastest plain SGD on the same tensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from optimizers import ROWS, measured, parameters

from rai_toolbox import optim

SHOWN = ("L2Normed, -1", "L2Normed, None", "LinfProjected")


def point(shapes: list[tuple[int, ...]], device: str) -> dict[str, float]:
    """The median times, in ms, of a step on tensors of these shapes."""
    params = parameters(shapes, device)
    fresh = [p.grad.clone() for p in params if p.grad is not None]
    steps = {f"SGD {kind}": torch.optim.SGD(params, lr=1e-9, **{kind: True}).step for kind in ("foreach", "fused")}
    steps["SGD loop"] = torch.optim.SGD(params, lr=1e-9, foreach=False).step
    for label in SHOWN:
        steps[label] = getattr(optim, ROWS[label].name)(params, lr=1e-9, **ROWS[label].keywords).step
    entries = sum(p.numel() for p in params)
    times = {k: median(v) for k, v in measured(steps, params, fresh, 5 if entries > 1e7 else 15, device).items()}
    return {"SGD": min(v for k, v in times.items() if k.startswith("SGD"))} | {k: times[k] for k in SHOWN}


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels: the ratio to SGD against the number, and against the size, of tensors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, (key, label) in zip(
        axes, (("tensors", "tensors of 1,000 entries"), ("entries", "entries of one tensor")), strict=True
    ):
        for name in SHOWN:
            ax.plot(
                [int(n) for n in results[key]],
                [p[name] / p["SGD"] for p in results[key].values()],
                marker="o",
                markersize=3,
                label=name,
            )
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("time of a step / fastest SGD step")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure, print, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, default=Path("bench-results/growth.svg"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=8, help="decimal logarithm of the largest tensor")
    args = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "device": args.device, "tensors": {}, "entries": {}}
    for n in (1, 4, 16, 64, 256, 1024, 4096):
        results["tensors"][n] = point([(10, 100)] * n, args.device)
        print(n, "tensors", results["tensors"][n], flush=True)
    for exponent in range(3, args.largest + 1):
        results["entries"][10**exponent] = point([(10 ** (exponent - 2), 100)], args.device)
        print(f"1e{exponent} entries", results["entries"][10**exponent], flush=True)
    out = Path("bench-results/growth.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    plot(results, args.plot)


if __name__ == "__main__":
    main()
