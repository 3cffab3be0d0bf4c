"""How far the curve of an evaluation lies above what `worst_case` finds, between the reported radii too.

    python bench/curve.py --case linf-28 --norm linf --norm l2 --data 100

At each of fifty radii, evenly up to the largest reported one, `worst_case` with its defaults tries the samples that
stand there by their distances in the result of `evaluate`. The gap is the share of the samples that it breaks. That is
never less than the difference between the reported accuracy and that under `worst_case`, which may miss what the
evaluation has broken. Samples that are known to be broken only far outside the radius (`--near`) are taken to stand.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from solver_models import Case, digits28_case, digits_case

from rai_toolbox.perturbations import worst_case
from rai_toolbox.perturbations._ball import Norm
from rai_toolbox.robustness import evaluate

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
KINDS = ("standard", "linf", "l2")
CASES: dict[str, Callable[[int], Case]] = {
    **{kind: partial(digits_case, kind) for kind in KINDS},
    **{f"{kind}-28": partial(digits28_case, kind) for kind in KINDS},
}


def gaps(case: Case, norm: Norm, count: int, near: float, options: dict[str, Any]) -> dict[str, Any]:
    """Return the largest gap, where it is, and what the evaluation cost."""
    begun = time.process_time()
    result = evaluate(
        case.model, (case.data, case.target), norms=norm, bounds=case.bounds, diagnostics=False, average=0, **options
    )
    spent = time.process_time() - begun
    curve, distance = result.curves[str(norm)], result.distance[str(norm)]
    largest = curve.points[-1].epsilon
    radii = np.linspace(0, largest, count + 1)[1:]
    # Between whole numbers nothing changes.
    radii = np.unique(np.floor(radii[radii >= 1])) if norm == "l0" else radii
    standing = (distance > radii[:, None]) & (distance <= near * radii[:, None] + (norm == "l0"))
    at, rows = map(torch.from_numpy, np.nonzero(standing))
    found = worst_case(
        case.model, case.data[rows], case.target[rows], norm=norm, epsilon=torch.from_numpy(radii)[at],
        bounds=case.bounds, batch_size=512,
    )  # fmt: skip
    gap = np.bincount(at[found.success], minlength=len(radii)) / len(distance)
    worst = int(np.argmax(gap))
    return {
        "case": case.name,
        "norm": norm,
        "largest": largest,
        "gap": float(gap[worst]),
        "at": float(radii[worst]),
        "reported there": float((distance > radii[worst]).mean()),
        "radii above .02": int((gap > 0.02 + 1e-9).sum()),
        "mean gap": float(np.mean(gap)),
        "forwards": curve.forwards_per_sample,
        "seconds": spent,
    }


def main() -> None:
    """Measure, print a line for each case and norm, and write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--norm", choices=NORMS, action="append", help="default: all")
    parser.add_argument("--data", type=int, default=100, help="held-out samples")
    parser.add_argument("--radii", type=int, default=50)
    parser.add_argument("--near", type=float, default=1.5, help="how many radii away a sample is tried at most")
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--out", type=Path, default=Path("bench-results/curve.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.case or CASES:
        case = CASES[name](options.data)
        for norm in options.norm or NORMS:
            row = gaps(case, norm, options.radii, options.near, {"budget": options.budget})
            rows.append(row)
            print(
                f"{row['case']:22} {norm:5} gap {row['gap']:.3f} at {row['at']:.4g} of {row['largest']:.4g}, where"
                f" {row['reported there']:.2f} stand; above .02 at {row['radii above .02']} radii, mean"
                f" {row['mean gap']:.4f}; {row['forwards']:.0f} forward passes a sample, {row['seconds']:.0f} s",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
