"""What an evaluation is going to cost: passes through the model, times a measured pass and step of a solver."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rai_toolbox import frozen
from rai_toolbox.kernels._machine import kind_of
from rai_toolbox.perturbations import worst_case
from rai_toolbox.robustness._errors import arg
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.run._passes import CHECKS, Passes, passes_by_stage

# A measurement takes about so long, at most a few times that.
_SECONDS = 1.0
_TIMES = 15
# Of a solver that is measured; fewer where a batch has more entries than this.
_STEPS, _FEW_STEPS, _MANY_ENTRIES = 8, 3, 10**6
# By how much the passes of a stage were less and more than expected, on four networks, in four norms, two budgets.
_RANGES: Mapping[str, tuple[float, float]] = {
    "search": (0.9, 1.1),
    "confirm": (0.6, 1.5),
    CHECKS: (0.8, 1.3),
}
_RANGE = (0.9, 1.1)


@dataclass(frozen=True)
class _Costs:
    """Seconds of a call and, beside that, of a sample in it: forward, and forward and backward in a solver."""

    forward: tuple[float, float]
    both: tuple[float, float]

    def of(self, passes: Passes) -> float:
        forward = self.forward[0] * passes.forward_calls + self.forward[1] * passes.forward
        return forward + self.both[0] * passes.both_calls + self.both[1] * passes.both


@dataclass(frozen=True)
class Estimate:
    """The cost of an evaluation, without the attacks that only doubtful checks ask for."""

    # attacks, checks: seconds
    attacks: float
    checks: float
    # low, high: of both together, the least and the most that is likely: how many samples stand at a radius is not
    # known yet, and neither is what else the machine will have to do
    low: float
    high: float
    samples: int  # that the solvers work on: those that the model gets right
    passes: float  # of each, forward and backward, in the attacks
    seconds_per_pass: float  # for one sample

    def __str__(self) -> str:
        total = self.attacks + self.checks
        parts = (
            f"{self.samples} samples x {self.passes:.0f} passes x {_spelled(self.seconds_per_pass)} ="
            f" {_clock(self.attacks)} for the attacks, {_clock(self.checks)} for the checks"
        )
        shorter = ", ".join(
            (arg("budget", "quick"), arg("samples"), arg("steps"), arg("restarts"), arg("diagnostics", "False"))
        )
        return (
            f"about {_clock(total)}, between {_clock(self.low)} and {_clock(self.high)} ({parts}); shorter with"
            f" {shorter}, or ended by {arg('time_limit')}"
        )


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(1, round(seconds))))


def _spelled(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def estimate(subject: Subject, right: int, outputs: int, *, share_left: float = 1.0, processes: int = 1) -> Estimate:
    """Return the cost of what follows the look at the model.

    right: how many samples the model gets right (regression: how many there are).
    outputs: of the model.
    share_left: of the batches, how many an earlier run has not done.
    processes: that share the work.
    """
    costs = _measured(subject, outputs)
    attacks = checks = low = high = both = 0.0
    for stage, norm, passes in passes_by_stage(subject, right, outputs):
        fastest, usual = costs[norm]
        share = (1.0 if stage == CHECKS else share_left) / processes
        least, most = _RANGES.get(stage, _RANGE)
        seconds = share * usual.of(passes)
        low, high = low + share * least * fastest.of(passes), high + most * seconds
        if stage == CHECKS:
            checks += seconds
        else:
            attacks, both = attacks + seconds, both + share_left * passes.both / processes
    return Estimate(attacks, checks, low, high, right, both / right, attacks / max(1.0, both))


def _measured(subject: Subject, outputs: int) -> dict[Norm, tuple[_Costs, _Costs]]:
    """Measure a pass of a full batch and of a small one, and what a solver of each norm does around it.

    Returns, by norm, the costs by the fastest of some times and by the median of them.
    """
    x, _ = subject.batch(*subject.span(0))
    few = max(1, len(x) // 8)
    with torch.enable_grad(), frozen(*subject.modules):
        both = _of_both_sizes(lambda count: _both(subject.model, x[:count]), len(x), few, subject)
    forward = _of_both_sizes(lambda count: _forward(subject.model, x[:count]), len(x), few, subject)
    costs = {}
    for norm in subject.settings.norms:
        solver = _of_both_sizes(
            lambda count, norm=norm: _solve(subject, norm, x[:count], outputs), len(x), few, subject
        )
        costs[norm] = tuple(
            # Attacks without a gradient draw and project too, about half as much.
            _Costs(
                (alone[0] + solver[way][0] / 2, alone[1]),
                (both[way][0] + solver[way][0], both[way][1] + solver[way][1]),
            )
            for way, alone in enumerate(forward)
        )
    return costs


def _of_both_sizes(work: Callable[[int], float], count: int, few: int, subject: Subject) -> list[tuple[float, float]]:
    """Return what a call takes and what each sample in it: by the fastest of a few times, and by their median.

    Beside other work some of them may take fifty times as long as the others: so there are fifteen, where these are
    short. `work` is given a number of samples, and returns in how many calls it has asked about them.
    """
    large, small = (_times(work, size, subject) for size in (count, few))
    return [_line(pick(large), pick(small), count, few) for pick in (min, lambda taken: sorted(taken)[len(taken) // 2])]


def _line(large: float, small: float, count: int, few: int) -> tuple[float, float]:
    if count == few:
        return 0.0, large / count
    fixed = min(max(0.0, (small * count - large * few) / (count - few)), large)
    return fixed, (large - fixed) / count


def _times(work: Callable[[int], float], size: int, subject: Subject) -> list[float]:
    taken: list[float] = []
    begun = time.perf_counter()
    while not taken or (time.perf_counter() - begun < _SECONDS and len(taken) < _TIMES):
        before = time.perf_counter()
        calls = work(size)
        if kind_of(subject.device) == "cuda":
            torch.cuda.synchronize(subject.device)
        taken.append((time.perf_counter() - before) / calls)
    return taken


def _forward(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x)
    return 1


def _both(model: nn.Module, x: Tensor) -> float:
    leaf = x.detach().clone().requires_grad_()
    torch.autograd.grad(model(leaf).float().sum(), leaf)
    return 1


def _solve(subject: Subject, norm: Norm, x: Tensor, outputs: int) -> float:
    """Let a solver attack a model that costs next to nothing and withstands it; return in how many passes."""
    calls, standing = 0, x.new_zeros(max(2, outputs))
    standing[0] = 4.0

    def model(points: Tensor) -> Tensor:
        nonlocal calls
        calls += points.requires_grad
        return standing + torch.tanh(1e-3 * points.flatten(1).mean(dim=1, keepdim=True))

    label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    size = x[0].numel() if subject.box.movable is None else int(subject.box.movable.sum())
    worst_case(
        model, x, label if subject.classifies else torch.zeros_like(model(x)), norm=norm, bounds=subject.box.of(x),
        epsilon={"linf": 0.01, "l2": 0.01 * size**0.5, "l1": 0.01 * size, "l0": max(1.0, size // 100)}[norm],
        steps=_STEPS if x.numel() < _MANY_ENTRIES else _FEW_STEPS, restarts=1,
    )  # fmt: skip
    return max(1, calls)
