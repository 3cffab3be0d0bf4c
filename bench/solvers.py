"""How strong the solvers are and what they cost, with other libraries beside them where they are installed.

    python bench/solvers.py [--data 250] [--cases standard,linf,l2,mlp] [--json FILE] [--quick]

Robust accuracy at a fixed radius, its flatness under a scaling of the logits, and the optimality of minimum-norm
perturbations. Forward and backward passes per datum are counted by hooks on the model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from solver_models import Case, digits_case, moons_case, series_case
from torch import Tensor, nn

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import gradient_ascent, minimum_norm, worst_case

RADII = {
    "digits standard": {"linf": 0.1, "l2": 0.5, "l1": 1.3, "l0": 1},
    "digits mlp": {"linf": 0.06, "l2": 0.35, "l1": 1.0, "l0": 1},
    "digits linf": {"linf": 0.18, "l2": 0.7, "l1": 1.3, "l0": 1},
    "digits l2": {"linf": 0.15, "l2": 0.8, "l1": 1.8, "l0": 2},
}
NORM_ORDER = {"linf": math.inf, "l2": 2, "l1": 1, "l0": 0}


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

    def _backward(self, module: nn.Module, grad_input: object, grad_output: tuple[Tensor, ...]) -> None:
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


def sizes(delta: Tensor, norm: str) -> Tensor:
    delta = delta.double().flatten(1)
    return (delta != 0).sum(1).double() if norm == "l0" else delta.norm(p=NORM_ORDER[norm], dim=1)


def measured(case: Case, solve: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """The perturbed data, and forward and backward passes per datum."""
    passes = Passes(case.model)
    try:
        x = solve()
    finally:
        passes.close()
    return x.detach(), passes.forward / len(case.data), passes.backward / len(case.data)


def plain_pgd(case: Case, norm: str, epsilon: float) -> Tensor:
    optimizer = {"linf": LinfProjectedOptim, "l2": L2ProjectedOptim}[norm]
    return gradient_ascent(
        model=case.model, data=case.data, target=case.target, optimizer=optimizer, epsilon=epsilon, lr=epsilon / 10,
        steps=100, bounds=case.bounds, use_best=True,
    )[0]  # fmt: skip


def fixed_budget(case: Case, norm: str, epsilon: float) -> dict[str, Callable[[], Tensor]]:
    model, x, y = case.model, case.data, case.target
    ours: dict[str, Callable[[], Tensor]] = {
        "worst_case": lambda: worst_case(model, x, y, norm=norm, epsilon=epsilon, bounds=case.bounds).perturbed,
        "worst_case, one run of 100": lambda: (
            worst_case(model, x, y, norm=norm, epsilon=epsilon, bounds=case.bounds, steps=100, restarts=1).perturbed
        ),
    }
    if norm in ("linf", "l2"):
        ours["gradient_ascent, plain PGD"] = lambda: plain_pgd(case, norm, epsilon)
    return {**ours, **peers_fixed_budget(case, norm, epsilon)}


def quietly_import(name: str) -> types.ModuleType | None:
    # adv-lib imports these for a metric and for plots that are not used here.
    for unused in ("torchvision", "visdom"):
        if unused not in sys.modules:
            stub = types.ModuleType(unused)
            stub.models, stub.Visdom = None, object  # type: ignore[attr-defined]
            sys.modules[unused] = stub
    try:
        return __import__(name, fromlist=["_"])
    except Exception as reason:
        print(f"({name} is left out: {type(reason).__name__}: {reason})")
        return None


def peers_fixed_budget(case: Case, norm: str, epsilon: float) -> dict[str, Callable[[], Tensor]]:
    model, x, y = case.model, case.data, case.target
    peers: dict[str, Callable[[], Tensor]] = {}
    if case.bounds != (0.0, 1.0) or norm == "l0":
        return peers
    order = NORM_ORDER[norm]
    if (auto_attack := quietly_import("pyautoattack")) is not None:

        def standard() -> Tensor:
            name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
            attack = auto_attack.AutoAttack(model, norm=name, eps=epsilon, seed=0, version="standard")
            attack.verbose = False
            result = attack.run_standard_evaluation(x, y, batch_size=len(x))
            return result[0] if isinstance(result, tuple) else result

        peers["AutoAttack standard"] = standard
    if (adv_lib := quietly_import("adv_lib.attacks")) is not None:
        peers["adv-lib APGD-CE"] = lambda: adv_lib.apgd(model, x, y, eps=epsilon, norm=order, loss_function="ce")
        peers["adv-lib APGD-DLR"] = lambda: adv_lib.apgd(model, x, y, eps=epsilon, norm=order, loss_function="dlr")
    if norm == "linf" and (torchattacks := quietly_import("torchattacks")) is not None:
        peers["torchattacks PGD"] = lambda: torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 10, steps=100)(x, y)
    if (foolbox := quietly_import("foolbox")) is not None:
        kind = {"linf": "LinfPGD", "l2": "L2PGD", "l1": "L1PGD"}[norm]
        wrapped = partial(foolbox.PyTorchModel, bounds=(0, 1))
        peers[f"foolbox {kind}"] = lambda: getattr(foolbox.attacks, kind)(steps=100)(
            wrapped(model), x, y, epsilons=epsilon
        )[1]
    return peers


def peers_minimum_norm(case: Case, norm: str) -> dict[str, Callable[[], Tensor]]:
    model, x, y = case.model, case.data, case.target
    peers: dict[str, Callable[[], Tensor]] = {}
    if case.bounds != (0.0, 1.0):
        return peers
    if (adv_lib := quietly_import("adv_lib.attacks")) is not None:
        peers["adv-lib FMN 1000"] = lambda: adv_lib.fmn(model, x, y, norm=NORM_ORDER[norm], steps=1000)
        if norm == "l2":
            peers["adv-lib DDN 1000"] = lambda: adv_lib.ddn(model, x, y, steps=1000)
        if norm in ("l1", "l2"):
            peers["adv-lib ALMA 1000"] = lambda: adv_lib.alma(model, x, y, distance=norm, num_steps=1000)
        if norm == "l0":
            peers["adv-lib sigma-zero 1000"] = lambda: adv_lib.sigma_zero(model, x, y)
        if norm != "l0":
            minimal = quietly_import("adv_lib.attacks.auto_pgd")
            top = {"linf": 0.8, "l2": 4.0, "l1": 12.0}[norm]
            if minimal is not None:
                peers["adv-lib minimal APGD-T"] = lambda: minimal.minimal_apgd(
                    model, x, y, norm=NORM_ORDER[norm], max_eps=top, targeted_version=True, binary_search_steps=14
                )
    if norm == "l2" and (foolbox := quietly_import("foolbox")) is not None:
        peers["foolbox DDN 1000"] = lambda: foolbox.attacks.DDNAttack(steps=1000)(
            foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=None
        )[1]
    return peers


def robust_share(case: Case, x: Tensor, norm: str, epsilon: float) -> float:
    """A datum is beaten if the decision is wrong at a point inside ball and box."""
    inside = sizes(x.double() - case.data.double(), norm) <= epsilon * (1 + 1e-5)
    if case.bounds is not None:
        inside &= ((x >= case.bounds[0]) & (x <= case.bounds[1])).flatten(1).all(1)
    beaten = (decisions(case.model, x) != case.target) & inside
    return 1 - (beaten | (decisions(case.model, case.data) != case.target)).double().mean().item()


def table_fixed_budget(case: Case, rows: list[dict[str, object]]) -> None:
    for norm, epsilon in case.epsilons.items():
        print(f"\n{case.name}, {norm} ≤ {epsilon}")
        for name, solve in fixed_budget(case, norm, epsilon).items():
            torch.manual_seed(0)
            x, forward, backward = measured(case, solve)
            share = robust_share(case, x, norm, epsilon)
            print(f"  {name:32s} robust accuracy {share:.3f}   forward {forward:7.1f}   backward {backward:7.1f}")
            rows.append(
                {"table": "fixed", "case": case.name, "norm": norm, "epsilon": epsilon, "solver": name,
                 "robust_accuracy": share, "forward": forward, "backward": backward}
            )  # fmt: skip


def table_scales(case: Case, rows: list[dict[str, object]]) -> None:
    print(f"\n{case.name}: robust accuracy with the logits multiplied")
    for norm in ("linf", "l2"):
        shares = {}
        for scale in (1e-4, 1.0, 100.0, 1e4):
            scaled = replace(case, model=Scaled(case.model, scale).eval())
            found = worst_case(
                scaled.model, case.data, case.target, norm=norm, epsilon=case.epsilons[norm], bounds=case.bounds
            )
            shares[scale] = robust_share(case, found.perturbed, norm, case.epsilons[norm])
        print(f"  {norm:5s}" + "".join(f"   x{scale:g}: {share:.3f}" for scale, share in shares.items()))
        rows.append({"table": "scales", "case": case.name, "norm": norm, **{str(k): v for k, v in shares.items()}})


def optimality(distance: Tensor, best: Tensor, clean: float) -> float:
    top = best[best.isfinite()].max()
    return (1 - (distance.clamp(max=top).mean() - best.mean()) / (clean * top - best.mean())).item()


def table_minimum_norm(case: Case, rows: list[dict[str, object]]) -> None:
    clean = (decisions(case.model, case.data) == case.target).double().mean().item()
    for norm in case.epsilons:
        found: dict[str, tuple[Tensor, float, float]] = {}
        solve = partial(minimum_norm, case.model, case.data, case.target, norm=norm, bounds=case.bounds)
        solvers = {
            "minimum_norm": lambda solve=solve: solve().perturbed,
            "minimum_norm, one sweep": lambda solve=solve: solve(restarts=9).perturbed,
            **peers_minimum_norm(case, norm),
        }
        for name, run in solvers.items():
            torch.manual_seed(0)
            x, forward, backward = measured(case, run)
            distance = sizes(x.double() - case.data.double(), norm)
            wrong = decisions(case.model, x) != case.target
            if case.bounds is not None:
                wrong &= ((x >= case.bounds[0]) & (x <= case.bounds[1])).flatten(1).all(1)
            distance = torch.where(wrong, distance, torch.inf)
            distance[decisions(case.model, case.data) != case.target] = 0
            found[name] = (distance, forward, backward)
        best = torch.stack([distance for distance, _, _ in found.values()]).amin(0)
        print(f"\n{case.name}, minimum {norm} (best known, mean: {best.mean():.4f})")
        for name, (distance, forward, backward) in found.items():
            share = optimality(distance, best, clean)
            print(
                f"  {name:32s} optimality {share:.4f}   found {distance.isfinite().double().mean():.3f}"
                f"   forward {forward:7.1f}   backward {backward:7.1f}"
            )
            rows.append(
                {"table": "minimum", "case": case.name, "norm": norm, "solver": name, "optimality": share,
                 "forward": forward, "backward": backward}
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=250, help="how many held-out digits")
    parser.add_argument("--cases", default="standard,linf,l2,mlp")
    parser.add_argument("--tables", default="fixed,scales,minimum")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    others = {"moons1": partial(moons_case, 1), "moons2": partial(moons_case, 2), "series": series_case}
    for name in options.cases.split(","):
        case = others[name]() if name in others else digits_case(name, options.data)
        case = replace(case, epsilons=RADII.get(case.name, case.epsilons))
        if "fixed" in options.tables:
            table_fixed_budget(case, rows)
        if "scales" in options.tables:
            table_scales(case, rows)
        if "minimum" in options.tables:
            table_minimum_norm(case, rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
