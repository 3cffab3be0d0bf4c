"""Print the largest error of every optimizer class in units of the last place, as the table of docs/explanation/ulp.md.

    python bench/ulp.py > docs/explanation/ulp.md

Each class takes a step of one parameter, in every dtype, for entries from the smallest subnormal to the largest finite,
several shapes and every `param_ndim`; the gradient and the parameter are compared with 80-bit arithmetic.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "optim"))

import longdouble_oracles as ld
import torch
from optimizer_cases import CASES, FLOATS, MAGNITUDES, Case, exact_step, stepped, values

SHAPES = [(5,), (2, 3, 4, 5), (2, 3000)]
SEEDS = range(2)

HEADER = """# Largest errors, in units of the last place

Printed by `python bench/ulp.py` (torch {version}, CPU). Each class took a step of one parameter for entries from the
smallest subnormal to the largest finite number of each dtype, shapes {shapes}, every
`param_ndim`, {seeds} seeds; {steps:,} steps a cell. The reference is 80-bit arithmetic. A correctly rounded result is
within 0.5.

The error of an entry is counted in units of the last place of its exact value; for the projections that subtract (L1
ball, simplex), of the largest entry of its datum. A point of float32 or float64 up to 4 eps (4 to 8 units) outside a
ball is left where it is, so that a second projection changes nothing; a point of a half up to 0.52 eps (1.04 units).

| class | of | float16 | bfloat16 | float32 | float64 |
| --- | --- | ---: | ---: | ---: | ---: |"""


def largest_errors(case: Case, dtype: torch.dtype) -> tuple[float, float, int]:
    """The largest error of a gradient and of a parameter, and how many steps were taken."""
    of_grad = of_param = 0.0
    steps = 0
    for shape in SHAPES:
        for param_ndim in (None, *range(len(shape) + 1)):
            for seed in SEEDS:
                for i, magnitude in enumerate(MAGNITUDES):
                    x = values(shape, dtype, MAGNITUDES[(i + seed) % len(MAGNITUDES)], 2 * seed)
                    g = values(shape, dtype, magnitude, 2 * seed + 1)
                    exact_grad, exact_param, k = exact_step(case, x, g, param_ndim)
                    grad, param = stepped(case, x, g, param_ndim=param_ndim)
                    of_grad = max(of_grad, ld.error_in_ulp(grad, exact_grad, k))
                    of_param = max(of_param, ld.error_in_ulp(param, exact_param, k, of_datum=case.subtracts))
                    steps += 1
    return of_grad, of_param, steps


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    steps = 0
    for case in CASES:
        if case.name == "ParamTransforming" or case.name.endswith(" 0"):
            continue
        errors = []
        for dtype in FLOATS:
            of_grad, of_param, steps = largest_errors(case, dtype)
            errors.append((of_grad, of_param))
        name = case.name.replace(" 0.75", "")
        for i, of in enumerate(("gradient", "parameter")):
            transforms = case.grad if i == 0 else case.param or case.name.endswith("FrankWolfe")
            if transforms:
                cells = " | ".join("exact" if e[i] == 0 else f"{e[i]:.2f}" for e in errors)
                rows.append(f"| {name} | {of} | {cells} |")
    print(
        HEADER.format(
            version=torch.__version__.partition("+")[0],
            shapes=", ".join(map(str, SHAPES)),
            seeds=len(SEEDS),
            steps=steps,
        )
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
