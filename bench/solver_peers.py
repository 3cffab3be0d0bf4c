"""The solvers of other libraries, where they are installed: adv-lib, AutoAttack, foolbox and torchattacks."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from solver_models import NORM_ORDER, Case
from torch import Tensor, nn

Solve = Callable[[], Tensor]

AUTO_ATTACK = "AutoAttack standard"


def _stand_in(name: str) -> None:
    """adv-lib imports torchvision and visdom for pictures that nobody asked for: where there is none, this will do."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        stub: Any = types.ModuleType(name)
        stub.models, stub.Visdom = None, object
        sys.modules[name] = stub


@functools.cache
def installed(name: str) -> Any:
    """The module, or None, once said why."""
    _stand_in("torchvision")
    _stand_in("visdom")
    try:
        return importlib.import_module(name)
    except Exception as reason:
        print(f"({name} is left out: {type(reason).__name__}: {reason})", flush=True)
        return None


def _wrapped(model: nn.Module) -> Any:
    return installed("foolbox").PyTorchModel(model, bounds=(0, 1))


def fixed_budget(case: Case, norm: str, epsilon: float) -> dict[str, Solve]:
    """What other libraries do at a fixed radius; the images of their choice, possibly outside ball and box."""
    model, x, y = case.model, case.data, case.target
    peers: dict[str, Solve] = {}
    if case.bounds != (0.0, 1.0) or norm == "l0":
        return peers
    order = NORM_ORDER[norm]
    if (auto_attack := installed("pyautoattack")) is not None:

        def standard() -> Tensor:
            name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
            attack = auto_attack.AutoAttack(model, norm=name, eps=epsilon, seed=0, version="standard")
            attack.verbose = False
            result = attack.run_standard_evaluation(x, y, batch_size=len(x))
            return result[0] if isinstance(result, tuple) else result

        peers[AUTO_ATTACK] = standard
    if (adv_lib := installed("adv_lib.attacks")) is not None:
        apgd = partial(adv_lib.apgd, model, x, y, eps=epsilon, norm=order)
        peers["adv-lib APGD-CE 100"] = partial(apgd, loss_function="ce", use_large_reps=norm == "l1")
        if norm == "l1":
            peers["adv-lib APGD-T 9 x 100"] = lambda: adv_lib.apgd_targeted(
                model, x, y, eps=epsilon, norm=order, use_large_reps=True
            )
    if norm == "linf" and (torchattacks := installed("torchattacks")) is not None:
        peers["torchattacks PGD 100"] = lambda: torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 10, steps=100)(
            x, y
        )
    if norm == "l2" and (torchattacks := installed("torchattacks")) is not None:
        peers["torchattacks PGD 100"] = lambda: torchattacks.PGDL2(model, eps=epsilon, alpha=epsilon / 10, steps=100)(
            x, y
        )
    if (foolbox := installed("foolbox")) is not None:
        kind = {"linf": "LinfPGD", "l2": "L2PGD", "l1": "L1PGD"}[norm]
        attack = getattr(foolbox.attacks, kind)(steps=100)
        peers["foolbox PGD 100"] = lambda: attack(_wrapped(model), x, y, epsilons=epsilon)[1]
    return peers


def five_runs(case: Case, norm: str, epsilon: float, x: Tensor, stands: Tensor) -> Tensor:
    """The images `x`, with those of five runs of adv-lib's APGD where these stand; `x` where adv-lib is missing."""
    adv_lib = installed("adv_lib.attacks")
    x, stands = x.clone(), stands.clone()
    for number in range(5):
        rows = stands.nonzero()[:, 0]
        if adv_lib is None or not len(rows):
            break
        torch.manual_seed(number)
        x[rows] = adv_lib.apgd(
            case.model, case.data[rows], case.target[rows], eps=epsilon, norm=NORM_ORDER[norm],
            loss_function=("dlr", "ce")[number % 2], use_large_reps=norm == "l1",
        )  # fmt: skip
        with torch.no_grad():
            stands[rows] = case.model(x[rows]).argmax(1) == case.target[rows]
    return x


def minimum_norm(case: Case, norm: str, large: bool) -> dict[str, Solve]:
    """The minimum-norm attacks of other libraries; `large`: also those of 10,000 passes."""
    model, x, y = case.model, case.data, case.target
    peers: dict[str, Solve] = {}
    if case.bounds != (0.0, 1.0):
        return peers
    if (adv_lib := installed("adv_lib.attacks")) is not None:
        peers["adv-lib FMN 1000"] = lambda: adv_lib.fmn(model, x, y, norm=NORM_ORDER[norm], steps=1000)
        if norm == "l2":
            peers["adv-lib DDN 1000"] = lambda: adv_lib.ddn(model, x, y, steps=1000, levels=None)
        if norm in ("l1", "l2"):
            peers["adv-lib ALMA 1000"] = lambda: adv_lib.alma(model, x, y, distance=norm, num_steps=1000)
        if norm == "l0":
            peers["adv-lib sigma-zero 1000"] = lambda: adv_lib.sigma_zero(model, x, y, num_steps=1000)
            peers["adv-lib VFGA"] = lambda: adv_lib.vfga(model, x, y, targeted=False)
        elif large and (minimal := installed("adv_lib.attacks.auto_pgd")) is not None:
            top = {"linf": 0.8, "l2": 4.0, "l1": 12.0}[norm]
            peers["adv-lib minimal APGD-T"] = lambda: minimal.minimal_apgd(
                model, x, y, norm=NORM_ORDER[norm], max_eps=top, targeted_version=True, binary_search_steps=14
            )
    return peers
