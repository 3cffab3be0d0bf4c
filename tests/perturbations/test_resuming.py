"""A solve that goes on from a state that was kept finds what an undisturbed one finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rai_toolbox.perturbations import minimum_norm, worst_case
from rai_toolbox.perturbations._resuming import Keeper


class Ended(Exception):
    """The process ends."""


class Kept(Keeper):
    """Keeps the states of the first runs, and ends the solve after one of them."""

    def __init__(self, state: Mapping[str, Tensor] | None, runs: int, end: int) -> None:
        self.state, self._runs, self._end = state, runs, end

    def __call__(self, number: int, found: Tensor) -> Any:
        if number == self._end:
            raise Ended

    def kept(self) -> Mapping[str, Tensor] | None:
        return self.state

    def keep(self, state: Callable[[], dict[str, Tensor]]) -> None:
        if self._runs:
            self.state = {name: tensor.clone() for name, tensor in state().items()}
        self._runs -= 1


EPSILON = {"l2": 0.12, "linf": 0.03, "l1": 0.4, "l0": 1}


@pytest.mark.parametrize("norm", EPSILON)
@pytest.mark.parametrize(("runs", "end"), [(1, 4), (3, 6), (10, 10)])
@pytest.mark.parametrize("classes", [4, 30])
def test_a_solve_goes_on_from_whatever_run_was_kept(norm: Any, runs: int, end: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 * 2)
    x = torch.rand(30, 20, generator=generator)
    options: dict[str, Any] = {"norm": norm, "bounds": (0, 1), "steps": 10, "restarts": 14}
    for solve in (worst_case, minimum_norm):
        more = {"epsilon": EPSILON[norm]} if solve is worst_case else {}

        def found(callback: Kept | None, solve: Any = solve, more: Any = more) -> Tensor:
            random = torch.Generator().manual_seed(1)
            return solve(net, x, net(x).argmax(1), callback=callback, generator=random, **options, **more).perturbed

        undisturbed, first = found(None), Kept(None, runs, end)
        with contextlib.suppress(Ended):  # few classes take few runs, and the solve may be done before
            found(first)
        assert torch.equal(found(Kept(first.state, 0, -1)), undisturbed)
