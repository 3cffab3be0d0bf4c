"""How strong the solvers are and what they cost, with other libraries beside them where they are installed.

    python bench/solvers.py                          # all tables, and bench-results/solvers.md and .json
    python bench/solvers.py --table fixed --case linf --data 250 --minimum-data 250 --large

Robust accuracy at a fixed radius; the optimality of minimum-norm perturbations; the curve of an evaluation at fifty
radii; the flatness of robust accuracy under a scaling of the logits; and plain PGD through `gradient_ascent` beside a
loop written by hand. A sample counts as beaten only if the decision is wrong at a point inside ball and box. Forward
and backward passes per sample are counted by hooks on the model; times are those of the processor. Optimality is
1 - (mean(min(d, dmax)) - mean(d*)) / (clean dmax - mean(d*)): d the distances found, d* the least found by any solver
of the table, dmax the largest d*, clean the clean accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import curve
import solver_peers
import torch
from solver_models import DIGITS28, NORM_ORDER, Case, digits28_case, digits_case, moons_case, pairs_case, series_case
from solver_tables import OURS, TITLES, UNION, Row, as_markdown
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent, minimum_norm, worst_case

CASES: dict[str, Callable[[int], Case]] = {
    **{kind: partial(digits_case, kind) for kind in ("standard", "linf", "l2", "mlp")},
    **{f"{kind}-28": partial(digits28_case, kind) for kind in ("standard", "linf", "l2")},
    "pairs": pairs_case,
    "moons1": lambda n: moons_case(1),
    "moons2": lambda n: moons_case(2),
    "series": series_case,
}
_SMALL, _LARGE = ("standard", "linf", "l2"), ("standard-28", "linf-28", "l2-28")
#: The cases of each table, where none is asked for.
USUAL = {
    "fixed": (*_SMALL, *_LARGE, "pairs"),
    "minimum": (*_SMALL, *_LARGE),
    "curve": ("linf-28",),
    "scale": _SMALL,
    "pgd": _SMALL,
}
Solve = Callable[[], Tensor]


class Passes:
    """Rows that went forward and backward through a model while this was open."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        self._hooks = [
            model.register_forward_pre_hook(self._forward),
            model.register_full_backward_hook(self._backward),
        ]

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.forward += len(args[0])

    def _backward(self, module: nn.Module, grad_input: object, grad_output: Any) -> None:
        self.backward += len(grad_output[0])

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Scaled(nn.Module):
    """A model whose logits are multiplied: the same decisions."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


def decisions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    return (output.reshape(-1) > 0).long() if output.ndim == 1 or output.shape[1] == 1 else output.argmax(1)


def distances(case: Case, x: Tensor, norm: str) -> Tensor:
    """How far each sample was moved: 0 where it was wrong before, infinite where it is not, or left the box."""
    delta = (x.double() - case.data.double()).flatten(1)
    distance = (delta != 0).sum(1).double() if norm == "l0" else delta.norm(p=NORM_ORDER[norm], dim=1)
    wrong = decisions(case.model, x) != case.target
    if case.bounds is not None:
        wrong &= ((x >= case.bounds[0]) & (x <= case.bounds[1])).flatten(1).all(1)
    distance = torch.where(wrong, distance, torch.inf)
    return torch.where(decisions(case.model, case.data) != case.target, 0.0, distance)


def robust_share(case: Case, x: Tensor, norm: str, epsilon: float) -> float:
    return (distances(case, x, norm) > epsilon * (1 + 1e-5)).double().mean().item()


def measured(case: Case, solve: Solve) -> tuple[Tensor, dict[str, float]]:
    """The perturbed data, and forward and backward passes per sample."""
    torch.manual_seed(0)
    passes = Passes(case.model)
    begin = time.process_time()
    try:
        x = solve().detach()
    finally:
        passes.close()
    n = len(case.data)
    cost = {"forward": passes.forward / n, "backward": passes.backward / n, "seconds": time.process_time() - begin}
    return x, cost


def plain_pgd(case: Case, norm: str, epsilon: float, steps: int = 100) -> Tensor:
    optimizer = {"linf": LinfProjectedOptim, "l2": L2ProjectedOptim}[norm]
    return gradient_ascent(
        model=case.model, data=case.data, target=case.target, optimizer=optimizer, epsilon=epsilon, lr=epsilon / 10,
        steps=steps, bounds=case.bounds,
    )[0]  # fmt: skip


def bisected(case: Case, norm: Any) -> Tensor:
    """Nine bisections of epsilon, each by one run of 100 steps."""
    far = 1.0 if norm == "linf" else 12.0 * case.epsilons[norm]
    low = torch.zeros(len(case.data), dtype=torch.float64)
    high, nearest = torch.full_like(low, far), case.data.clone()
    for _ in range(9):
        middle = (low + high) / 2
        found = worst_case(
            case.model, case.data, case.target, norm=norm, epsilon=middle, bounds=case.bounds, steps=100, restarts=1
        )
        nearest[found.success] = found.perturbed[found.success]
        high = torch.where(found.success, torch.minimum(middle, found.distances), high)
        low = torch.where(found.success, low, middle)
    return nearest


def pgd_by_hand(case: Case, norm: str, epsilon: float, steps: int = 100) -> Tensor:
    """The same, in as few operations as plain torch allows."""
    x, lr = case.data, epsilon / 10
    delta = torch.zeros_like(x)
    low, high = (None, None) if case.bounds is None else (case.bounds[0] - x, case.bounds[1] - x)
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(case.model(x + delta), case.target, reduction="sum"), delta)
        with torch.no_grad():
            if norm == "linf":
                delta = (delta + lr * grad.sign()).clamp_(-epsilon, epsilon)
            else:
                flat = grad.flatten(1)
                delta = delta + lr * (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
                size = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
                delta *= (epsilon / size).clamp_max(1).view(-1, *(1,) * (x.ndim - 1))
            if low is not None:
                delta = torch.clamp(delta, low, high)
    perturbed = x + delta.detach()
    return perturbed if case.bounds is None else perturbed.clamp(*case.bounds)


class Bench:
    """The tables of one case; every solve is reported as soon as it is done."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._name = name
        self._options = options
        self._case = cache(CASES[name])

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def fixed(self) -> list[Row]:
        case = self._case(self._options.data)
        model, x, y, rows = case.model, case.data, case.target, []
        for norm, epsilon in case.epsilons.items():
            solve = partial(worst_case, model, x, y, norm=norm, epsilon=epsilon, bounds=case.bounds)
            solvers: dict[str, Solve] = {
                OURS: lambda solve=solve: solve().perturbed,
                "`worst_case`, one run of 100": lambda solve=solve: solve(steps=100, restarts=1).perturbed,
            }
            if self._name == "pairs":
                solvers["`worst_case`, nine runs"] = lambda solve=solve: solve(restarts=9).perturbed
            if norm in ("linf", "l2"):
                solvers["`gradient_ascent`, PGD 100"] = partial(plain_pgd, case, norm, epsilon)
            solvers |= solver_peers.fixed_budget(case, norm, epsilon)
            self._say(f"\n{case.name}, {norm} ≤ {epsilon}, {len(x)} samples")
            for name, run in solvers.items():
                found, cost = measured(case, run)
                self._keep(rows, case, norm, epsilon, name, found, cost)
                if name == solver_peers.AUTO_ATTACK:
                    stands = distances(case, found, norm) > epsilon * (1 + 1e-5)
                    both, more = measured(case, partial(solver_peers.five_runs, case, norm, epsilon, found, stands))
                    cost = {part: cost[part] + more[part] for part in cost}
                    self._keep(rows, case, norm, epsilon, UNION, both, cost)
        return rows

    def _keep(
        self, rows: list[Row], case: Case, norm: str, epsilon: float, name: str, x: Tensor, cost: dict[str, float]
    ) -> None:
        share = robust_share(case, x, norm, epsilon)
        rows.append({"case": case.name, "set": f"{norm} ≤ {epsilon}", "solver": name, "robust accuracy": share, **cost})
        self._say(f"  {name:36} {share:.3f}  {_passes(cost)}")

    def curve(self) -> list[Row]:
        case, rows = self._case(self._options.curve_data), []
        self._say(f"\n{case.name}, the curve at fifty radii, {len(case.data)} samples")
        for norm in ("linf", "l2"):
            found = curve.gaps(case, norm, 50, 1.2, {})
            names = {"gap": "largest gap", "at": "at", "mean gap": "mean gap", "forwards": "forward passes"}
            rows.append({"case": case.name, "norm": norm, **{names[name]: found[name] for name in names}})
            self._say(f"  {norm:5} gap {found['gap']:.3f} at {found['at']:.4g}, mean {found['mean gap']:.4f}")
        return rows

    def scale(self) -> list[Row]:
        case = self._case(self._options.data)
        rows = []
        self._say(f"\n{case.name}, logits multiplied")
        for norm in ("linf", "l2"):
            epsilon, row = case.epsilons[norm], {}
            for scale in (1e-4, 1.0, 100.0, 1e4):
                scaled = replace(case, model=Scaled(case.model, scale).eval())
                found = worst_case(
                    scaled.model, case.data, case.target, norm=norm, epsilon=epsilon, bounds=case.bounds
                ).perturbed
                row[f"x {scale:g}"] = robust_share(case, found, norm, epsilon)
            rows.append({"case": case.name, "set": f"{norm} ≤ {epsilon}", **row})
            self._say(f"  {norm:5}" + "".join(f"   {scale}: {share:.3f}" for scale, share in row.items()))
        return rows

    def minimum(self) -> list[Row]:
        case = self._case(self._options.minimum_data)
        rows = []
        clean = (decisions(case.model, case.data) == case.target).double().mean().item()
        for norm in case.epsilons:
            solve = partial(minimum_norm, case.model, case.data, case.target, norm=norm, bounds=case.bounds)
            solvers: dict[str, Solve] = {
                "`minimum_norm`": lambda solve=solve: solve().perturbed,
                "nine bisections by `worst_case`": partial(bisected, case, norm),
                **solver_peers.minimum_norm(case, norm, self._options.large),
            }
            self._say(f"\n{case.name}, minimum {norm}, {len(case.data)} samples")
            found: dict[str, tuple[Tensor, dict[str, float]]] = {}
            for name, run in solvers.items():
                x, cost = measured(case, run)
                found[name] = distances(case, x, norm), cost
                self._say(f"  {name:36} {_passes(cost)}")
            best = torch.stack([distance for distance, _ in found.values()]).amin(0)
            self._say(f"  best known: {best[best.isfinite()].mean():.4f} on average")
            for name, (distance, cost) in found.items():
                row = {"optimality": optimality(distance, best, clean), "found": distance.isfinite().double().mean()}
                row["found"] = float(row["found"])
                rows.append({"case": case.name, "set": norm, "solver": name, **row, **cost})
                self._say(f"  {name:36} optimality {row['optimality']:.4f}   found {row['found']:.3f}")
        return rows

    def pgd(self) -> list[Row]:
        case = self._case(self._options.data)
        rows = []
        self._say(f"\n{case.name}, plain PGD of 100 steps")
        for norm in ("linf", "l2"):
            epsilon = case.epsilons[norm]
            hand, ours = (partial(solve, case, norm, epsilon) for solve in (pgd_by_hand, plain_pgd))
            times: tuple[list[float], list[float]] = [], []
            for _ in range(self._options.rounds):
                for solve, spent in zip((hand, ours), times, strict=True):
                    begin = time.perf_counter()
                    solve()
                    spent.append(time.perf_counter() - begin)
            by_hand, by_ours = map(statistics.median, times)
            row = {
                "by hand": robust_share(case, hand(), norm, epsilon),
                "`gradient_ascent`": robust_share(case, ours(), norm, epsilon),
                "time ratio": by_ours / by_hand,
            }
            rows.append({"case": case.name, "set": f"{norm} ≤ {epsilon}", **row})
            self._say(f"  {norm:5}" + "".join(f"   {name}: {value:.3f}" for name, value in row.items()))
        return rows


def optimality(distance: Tensor, best: Tensor, clean: float) -> float:
    known = best.isfinite()
    distance, best = distance[known], best[known]
    top = best.max()
    excess, room = distance.clamp(max=top).mean() - best.mean(), clean * top - best.mean()
    return 1.0 if excess <= 0 else (1 - excess / room).item()


def _passes(cost: dict[str, float]) -> str:
    return f"forward {cost['forward']:7.1f}   backward {cost['backward']:7.1f}   ({cost['seconds']:.1f} s)"


def main() -> None:
    """Measure, print the tables, write them as JSON and markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--case",
        choices=CASES,
        action="append",
        help="default: standard, linf and l2, of 8 x 8 and, where RAI_DIGITS28 or ../shared has them, 28 x 28 digits;"
        " a hundred classes at a fixed radius",
    )
    parser.add_argument("--table", choices=TITLES, action="append")
    parser.add_argument("--data", type=int, default=40, help="samples of the tables at a fixed radius")
    parser.add_argument("--minimum-data", type=int, default=30, help="samples of the table of minimum norms")
    parser.add_argument("--curve-data", type=int, default=50, help="samples of the curve at fifty radii")
    parser.add_argument("--rounds", type=int, default=3, help="of the timed PGD")
    parser.add_argument("--large", action="store_true", help="other libraries' attacks of 10,000 passes too")
    parser.add_argument("--out", type=Path, default=Path("bench-results/solvers.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    peers = [
        name for name in ("pyautoattack", "adv_lib.attacks", "foolbox", "torchattacks") if solver_peers.installed(name)
    ]
    setting = (
        f"torch {torch.__version__}, one thread; {options.data} held-out samples at a fixed radius, "
        f"{options.minimum_data} for minimum norms, {options.curve_data} for the curve; other libraries: "
        f"{', '.join(peers) or 'none'}"
    )
    print(setting, flush=True)
    tables: dict[str, list[Row]] = {table: [] for table in options.table or TITLES}
    usual = (*_SMALL, *((*_LARGE, "pairs") if DIGITS28.exists() else ()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.case or usual:
        bench = Bench(name, options)
        for table, rows in tables.items():
            if options.table or name in USUAL[table] or name not in usual:
                rows += getattr(bench, table)()
        # After each case: a run that is ended leaves what it has measured.
        results = {"setting": setting, "tables": tables}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(as_markdown(results))
    print(f"\n{time.process_time() / 60:.1f} minutes of processor time", flush=True)


if __name__ == "__main__":
    main()
