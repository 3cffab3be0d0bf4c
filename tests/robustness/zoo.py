"""Models whose gradients mislead, and honest ones, all small: what the checks of the evaluation are measured on.

A misled model comes with other models that have the same outputs, nearly, and an honest gradient; attacking those
and looking at what is found on the model itself tells how fragile it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from rai_toolbox.perturbations import minimum_norm, worst_case
from rai_toolbox.perturbations.losses import margin, misclassified

GRIDS = {"l2": [0.4, 0.8, 1.2], "linf": [0.05, 0.1, 0.15], "l1": [1.0, 2.0, 4.0]}
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, where it is evaluated, and what else attacks it."""

    build: Callable[[], Function]
    norm: str = "l2"
    #: Models with nearly the same outputs whose gradient is honest.
    others: Callable[[], Sequence[Function]] = field(default=lambda: ())
    #: For regression, a table and the like.
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], tuple[Any, Any]] | None = None


@cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs (N, 1, 8, 8) and labels, then those of the test."""
    bunch: Any = load_digits()
    x = torch.from_numpy((bunch.images / 16).astype(np.float32))[:, None]
    y = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(7).permutation(len(x)))
    return x[order[300:]], y[order[300:]], x[order[:300]], y[order[:300]]


def train(net: nn.Module, *, steps: int = 60, lr: float = 0.02, two: bool = False, attack: str = "", seed: int = 0):
    """Train on all of the images at once; with `attack`, on perturbed ones."""
    x, y, _, _ = images()
    if two:
        y = (y >= 5).long()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    with torch.enable_grad():
        for step in range(steps):
            use = torch.randperm(len(x), generator=generator)[:512]
            a, b = x[use], y[use]
            if attack and step > steps // 4:
                a = _perturbed(net, a, b, attack)
            optimizer.zero_grad()
            loss(net(a), b).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def loss(out: Tensor, y: Tensor) -> Tensor:
    if out.shape[-1] == 1 or out.ndim == 1:
        return F.binary_cross_entropy_with_logits(out.reshape(-1), y.float())
    return F.cross_entropy(out, y)


def _perturbed(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    epsilon = {"linf": 0.12, "l2": 0.8}[norm]
    delta = torch.zeros_like(x)
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(net((x + leaf).clamp(0, 1)), y), leaf)
        if norm == "linf":
            delta = (delta + 0.5 * epsilon * grad.sign()).clamp(-epsilon, epsilon)
        else:
            delta = delta + 0.5 * epsilon * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
            delta = delta * (epsilon / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)).clamp_max(1)
    return (x + delta).clamp(0, 1).detach()


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    """Train without touching anybody's random state, once."""

    @cache
    def once() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return once


plain = seeded(lambda: train(mlp(64, 48, 10)))
relu = seeded(lambda: train(mlp(64, 48, 32, 10, activation=nn.ReLU)))
robust = seeded(lambda: train(mlp(64, 64, 10, activation=nn.ReLU), attack="l2", steps=120))
robust_linf = seeded(lambda: train(mlp(64, 64, 10, activation=nn.ReLU), attack="linf", steps=120))
convnet = seeded(
    lambda: train(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 10),
        ),
        lr=0.01,
    )
)  # fmt: skip


class Wrapped(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net: nn.Module, before: Function = lambda x: x, after: Function = lambda out: out) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def with_backward(forward: Function, backward: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """A function with a backward pass of its own: from (input, incoming gradient) to a gradient."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, *grads):
            return backward(*ctx.saved_tensors, grads[0])

    return lambda x: Made.apply(x)  # type: ignore[return-value]


def straight_through(function: Function) -> Function:
    return lambda x: x + (function(x) - x).detach()


# What is done to inputs and features.


def blur(x: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel[None, None])


@cache
def components(count: int = 16) -> Tensor:
    x = images()[0].flatten(1)
    return torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:count]


def purify(x: Tensor) -> Tensor:
    """Project on the principal components of the data."""
    basis, mean = components().to(x.dtype), images()[0].flatten(1).mean(0).to(x.dtype)
    return (((x.flatten(1) - mean) @ basis.T) @ basis + mean).reshape(x.shape)


def unpurified(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of what was taken away: the components that the data lack."""
    basis = components(40).to(x.dtype)
    flat = grad.flatten(1)
    away = flat - (flat @ basis.T) @ basis
    return (0.2 * flat + away.flip(1)).reshape(x.shape)


def median(x: Tensor) -> Tensor:
    return F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3).median(dim=1).values.reshape(x.shape)


def stairs(x: Tensor, levels: float = 8.0) -> Tensor:
    return (x * levels).round() / levels


def smooth_stairs(x: Tensor, levels: float = 10.0, sharp: float = 40.0) -> Tensor:
    scaled = x * levels
    low = scaled.detach().floor()
    return (low + torch.sigmoid(sharp * (scaled - low - 0.5))) / levels


def wavy(x: Tensor, levels: float = 12.0, part: float = 0.97) -> Tensor:
    return x - part * torch.sin(2 * np.pi * levels * x) / (2 * np.pi * levels)


class Thermometer(nn.Module):
    """Each pixel as which of its thresholds it exceeds, steeply; then a network."""

    def __init__(self, sharp: float | None = 60.0, levels: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.sharp = sharp
        self.register_buffer("at", torch.linspace(0.1, 0.9, levels))
        self.net = nn.Sequential(nn.Linear(64 * levels, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        over = x.flatten(1)[:, :, None] - self.at
        hard = (over > 0).to(x.dtype)
        if self.sharp is None:  # honest: the gradient of a ramp as wide as the steps lie apart
            soft = (over * 4 + 0.5).clamp(0, 1)
            code = soft + (hard - soft).detach()
        else:
            code = torch.sigmoid(self.sharp * over)
        return self.net(code.flatten(1))

    def honest(self) -> Thermometer:
        other = Thermometer(None, len(self.at))
        other.load_state_dict(self.state_dict())
        return other.eval().requires_grad_(False)


class Halves(nn.Module):
    """Two towers of features, of which one may be detached."""

    def __init__(self, part: float = 0.5, width: int = 48, detached: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)
        self.cut = int(part * width)
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.first(x.flatten(1)))
        if self.detached and not self.training:
            features = torch.cat([features[:, : self.cut].detach(), features[:, self.cut :]], dim=1)
        return self.second(features)

    def honest(self) -> Halves:
        return _copy(self, detached=False)


class Attention(nn.Module):
    """Rows attend to rows; what they attend to may be detached."""

    def __init__(self, detached: bool = False, width: int = 16, sharp: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(8 * width, 10)
        self.detached, self.sharp = detached, sharp

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x[:, 0]) + self.place
        scores = self.sharp * self.query(rows) @ self.key(rows).transpose(1, 2) / rows.shape[-1] ** 0.5
        weights = scores.softmax(dim=-1)
        if self.detached and not self.training:
            weights = weights.detach()
        return self.head(F.gelu(self.norm(rows + weights @ self.value(rows))).flatten(1))

    def honest(self) -> Attention:
        return _copy(self, detached=False)


class WinnersTakeAll(nn.Module):
    """Of the features only the k largest stay."""

    def __init__(self, share: float = 0.15, width: int = 96, smooth: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)
        self.count, self.smooth = int(share * width), smooth

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x.flatten(1))
        least = features.topk(self.count, dim=1).values[:, -1:]
        if self.smooth:
            soft = features * torch.sigmoid(6 * (features - least.detach()))
            return self.second(soft + (features * (features >= least) - soft).detach())
        return self.second(features * (features >= least).to(x.dtype))

    def honest(self) -> WinnersTakeAll:
        return _copy(self, smooth=True)


class Signs(nn.Module):
    """Features as signs about their means, with a gradient that sees only those very near to it."""

    def __init__(self, width: int = 96, narrow: float = 0.05, seen: float | None = 0.05) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)
        self.register_buffer("center", torch.zeros(width))
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x.flatten(1)) - self.center
        if self.training:
            return self.second(torch.tanh(3 * features))
        if self.seen is None:
            soft = torch.tanh(2 * features)
            return self.second(soft + (features.sign() - soft).detach())
        soft = self.seen * torch.tanh(features / self.seen)
        return self.second(soft + (features.sign() - soft).detach())

    def honest(self) -> Signs:
        return _copy(self, seen=None)


def _copy(net: Any, **changes: Any) -> Any:
    other = type(net).__new__(type(net))
    nn.Module.__init__(other)
    other.__dict__.update(net.__dict__)
    other.__dict__.update(changes)
    return other.eval()


def moat(out: Tensor, depth: float = 1e-3) -> Tensor:
    """Logits whose margin rises towards the boundary, where it jumps; no decision changes."""
    top = out.topk(2, dim=1).values
    gap = (top[:, :1] - top[:, 1:]) / 10
    return out / (gap + depth)


def raised_floor(out: Tensor) -> Tensor:
    """The winner gets ahead by what it lacked: the less sure, the higher the margin."""
    best = out.argmax(dim=1, keepdim=True)
    low = out.amin(dim=1, keepdim=True)
    return torch.zeros_like(out).scatter(1, best, 40.0) - 0.5 * (out - low)


def bowl(out: Tensor) -> Tensor:
    """A margin that is largest halfway to the boundary and falls steeply only next to it."""
    top = out.topk(2, dim=1).values
    gap = top[:, :1] - top[:, 1:]
    return out * (1 + 8 * torch.exp(-gap)) / (gap + 0.02)


def with_noise(scale: float, seed: int = 0) -> Function:
    """A ripple on the pixels that changes them by next to nothing, and their gradient by much."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(64, generator=generator)

    def ripple(x: Tensor) -> Tensor:
        return x + 0.004 * torch.sin(scale * x + phase.to(x.dtype).reshape(1, 1, 8, 8))

    return ripple


def _case(norm: str, build: Callable[[], Any], *others: Callable[[], Function]) -> Case:
    return Case(seeded(build), norm, lambda: [other() for other in others])


halves = seeded(lambda: train(Halves()))
halves_l1 = seeded(lambda: train(Halves(0.7), seed=1))
attention = seeded(lambda: train(Attention(sharp=3.0, detached=True), steps=90, lr=0.01))
thermometer = seeded(lambda: train(Thermometer(12.0)))
winners = seeded(lambda: train(WinnersTakeAll()))
signs = seeded(lambda: train(Signs(seen=0.02)))
signs_l2 = seeded(lambda: train(Signs(seen=0.3), seed=1))
blurred = seeded(lambda: train(Wrapped(mlp(64, 48, 10, seed=2), blur)))


def _sharp_thermometer() -> Thermometer:
    other = Thermometer(200.0)
    other.load_state_dict(thermometer().state_dict())
    return other.eval().requires_grad_(False)


def _sorted_features(detached: bool = True) -> nn.Module:
    """Each pixel plus its rank in its row: the rank has no gradient."""
    net = plain()

    def ranked(x: Tensor) -> Tensor:
        rank = x.argsort(dim=-1).argsort(dim=-1).to(x.dtype) / 7
        return 0.25 * x + 0.75 * x.detach() + 0.05 * rank if detached else x + 0.05 * rank

    return Wrapped(net, ranked)


#: By name: a model whose gradient misleads the solvers, or at least could.
MISLED: dict[str, Case] = {
    "half detached, L2": _case("l2", halves, lambda: halves().honest()),
    "half detached, Linf": _case("linf", halves, lambda: halves().honest()),
    "most detached, L1": _case("l1", halves_l1, lambda: halves_l1().honest()),
    "purifier, L2": _case(
        "l2", lambda: Wrapped(plain(), with_backward(purify, unpurified)), lambda: Wrapped(plain(), purify)
    ),
    "purifier without a gradient, L2": _case(
        "l2", lambda: Wrapped(plain(), lambda x: purify(x.detach()) + 0.05 * (x - x.detach()).flip(-1)),
        lambda: Wrapped(plain(), purify),
    ),
    "blur with a wrong gradient, L1": _case(
        "l1", lambda: Wrapped(blurred().net, with_backward(blur, lambda x, g: g.roll(2, -1) + 0.3 * g)),
        lambda: blurred(),
    ),
    "thermometer, Linf": _case("linf", _sharp_thermometer, lambda: thermometer().honest()),
    "thermometer, L2": _case("l2", _sharp_thermometer, lambda: thermometer().honest()),
    "smooth steps, L2": _case(
        "l2", lambda: Wrapped(plain(), smooth_stairs), lambda: Wrapped(plain(), straight_through(smooth_stairs))
    ),
    "waves, Linf": _case("linf", lambda: Wrapped(plain(), wavy), lambda: Wrapped(plain(), straight_through(wavy))),
    "detached attention, L2": _case("l2", attention, lambda: attention().honest()),
    "median, L2": _case(
        "l2", lambda: Wrapped(train(Wrapped(mlp(64, 48, 10, seed=3), median)).net, median),
        lambda: Wrapped(plain(), blur),
    ),
    "winners take all, L2": _case("l2", winners, lambda: winners().honest()),
    "winners take all, Linf": _case("linf", winners, lambda: winners().honest()),
    "thresholds at the mean, Linf": _case("linf", signs, lambda: signs().honest()),
    "thresholds at the mean, L2": _case("l2", signs_l2, lambda: signs_l2().honest()),
    "moat, L2": _case("l2", lambda: Wrapped(plain(), after=moat), lambda: plain()),
    "moat, Linf": _case("linf", lambda: Wrapped(plain(), after=raised_floor), lambda: plain()),
    "moat, L1": _case("l1", lambda: Wrapped(relu(), after=moat), lambda: relu()),
    "bowl, L2": _case("l2", lambda: Wrapped(relu(), after=bowl), lambda: relu()),
    "rounded inputs, Linf": _case(
        "linf", lambda: Wrapped(plain(), lambda x: stairs(x) + 0.01 * x),
        lambda: Wrapped(plain(), straight_through(stairs)),
    ),
    "rounded inputs, L2": _case(
        "l2", lambda: Wrapped(plain(), stairs), lambda: Wrapped(plain(), straight_through(stairs))
    ),
    "probabilities that saturate, L2": _case(
        "l2", lambda: Wrapped(plain(), after=lambda out: (30 * out).softmax(dim=1)), lambda: plain()
    ),
    "rounded logits, L2": _case(
        "l2", lambda: Wrapped(plain(), after=lambda out: (out * 2).round() / 2 + 1e-3 * out), lambda: plain()
    ),
    "a ripple, L2": _case("l2", lambda: Wrapped(plain(), with_noise(900.0)), lambda: plain()),
    "a ripple, Linf": _case("linf", lambda: Wrapped(relu(), with_noise(600.0)), lambda: relu()),
    "a backward pass with its sign wrong on half, L2": _case(
        "l2", lambda: Wrapped(plain(), with_backward(
            lambda x: x.clone(), lambda x, g: g * torch.where(torch.arange(64).reshape(1, 1, 8, 8) % 2 == 0, 1.0, -1.0)
        )), lambda: plain(),
    ),
    "ranks, Linf": _case("linf", _sorted_features, lambda: _sorted_features(False)),
}  # fmt: skip


class Residual(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = h + F.relu(block(h))
        return self.last(h)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, 0])[0][:, -1])


def _two_classes() -> tuple[Any, Any]:
    _, _, x, y = images()
    return x.numpy(), (y >= 5).long().numpy()


def _table() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 10)).astype(np.float32)
    return x, (x[:, 0] - 0.7 * x[:, 1] + 0.3 * x[:, 2] * x[:, 3] > 0).astype(np.int64)


def _table_net() -> nn.Module:
    x, y = (torch.from_numpy(part) for part in _table())
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def _values() -> tuple[Any, Any]:
    x, _ = _table()
    return x, (x[:, 0] - 0.5 * x[:, 1] ** 2).astype(np.float32)


def _values_net() -> nn.Module:
    x, y = (torch.from_numpy(part) for part in _values())
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        (net(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def _honest(norm: str, build: Callable[[], Any], **options: Any) -> Case:
    return Case(seeded(build), norm, **options)


#: By name: a model that the evaluation is right about.
HONEST: dict[str, Case] = {
    "tanh, L2": _honest("l2", plain),
    "tanh, L1": _honest("l1", plain),
    "ReLU, Linf": _honest("linf", relu),
    "ReLU, L1": _honest("l1", relu),
    "GELU, L2": _honest("l2", lambda: train(mlp(64, 48, 32, 10, activation=nn.GELU))),
    "convolutions, Linf": _honest("linf", convnet),
    "convolutions, L2": _honest("l2", convnet),
    "batch normalization, L2": _honest(
        "l2", lambda: train(nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
        )),
    ),
    "residual, Linf": _honest("linf", lambda: train(Residual(), lr=0.01)),
    "trained on attacks in L2": _honest("l2", robust),
    "trained on attacks in Linf": _honest("linf", robust_linf),
    "straight-through, L2": _honest("l2", lambda: Wrapped(plain(), straight_through(lambda x: stairs(x, 16.0)))),
    "transformer, L2": _honest("l2", lambda: train(Attention(), steps=90, lr=0.01)),
    "two classes, L2": _honest("l2", lambda: train(mlp(64, 32, 1), two=True), data=_two_classes),
    "bfloat16, Linf": _honest("linf", lambda: train(mlp(64, 48, 10, seed=4)).to(torch.bfloat16)),
    "linear, L2": _honest("l2", lambda: train(mlp(64, 10))),
    "linear, L1": _honest("l1", lambda: train(mlp(64, 10))),
    "float64, Linf": _honest("linf", lambda: train(mlp(64, 48, 10, seed=5)).double()),
    "recurrent, L2": _honest("l2", lambda: train(Recurrent(), steps=90)),
    "a blur in front, L2": _honest("l2", blurred),
    "a table, L2": _honest("l2", _table_net, data=_table, options={"epsilons": [0.3, 0.6, 1.2]}),
    "values, L2": _honest("l2", _values_net, data=_values, options={"task": "regression", "epsilons": [0.1, 0.3]}),
}  # fmt: skip


def data_of(case: Case, count: int) -> tuple[Any, Any]:
    """The inputs and targets of a case, the first so many."""
    if case.data is not None:
        x, y = case.data()
    else:
        x, y = images()[2].numpy(), images()[3].numpy()
    return x[:count], y[:count]


def true_accuracies(case: Case, count: int, grid: Sequence[float]) -> list[float]:
    """What the attacks on the honest counterparts leave of a misled model, looked at on the model itself."""
    model = case.build()
    x, y = (torch.from_numpy(part) for part in data_of(case, count))
    with torch.no_grad():
        distance = torch.where(misclassified(model(x), y), 0.0, torch.inf)
    for other in case.others():
        joint = _with_outputs_of(model, other)
        for attacked in (other, joint):
            found = minimum_norm(attacked, x, y, norm=case.norm, bounds=(0, 1), restarts=9)
            distance = torch.minimum(distance, _looked_at(model, x, y, found.perturbed, case.norm))
            for epsilon in grid:
                rows = distance > epsilon
                if rows.any():
                    tried = worst_case(
                        attacked, x[rows], y[rows], norm=case.norm, epsilon=epsilon, bounds=(0, 1), restarts=5
                    )
                    again = _looked_at(model, x[rows], y[rows], tried.perturbed, case.norm).clamp_max(epsilon)
                    again = torch.where(misclassified(model(tried.perturbed), y[rows]), again, torch.inf)
                    distance[rows] = torch.minimum(distance[rows], again)
    return [float((distance > epsilon).double().mean()) for epsilon in grid]


def _looked_at(model: Function, x: Tensor, y: Tensor, perturbed: Tensor, norm: str) -> Tensor:
    """How far the nearest error on the way to the points found is."""
    order = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}[norm]
    far = torch.linalg.vector_norm((perturbed - x).double().flatten(1), order, dim=1)
    nearest = torch.full_like(far, torch.inf)
    with torch.no_grad():
        for part in (0.9, 0.95, 1.0, 1.02, 1.05, 1.1, 1.2):
            wrong = misclassified(model((x + part * (perturbed - x)).clamp(0, 1)), y)
            nearest = torch.where(wrong & (nearest > part * far), part * far, nearest)
    return torch.where(far > 0, nearest, torch.inf).float()


def _with_outputs_of(model: Function, other: Function) -> Function:
    """The outputs of one with the gradient of the other, where both have margins of the same size."""

    def joint(x: Tensor) -> Tensor:
        mine, its = model(x).detach(), other(x)
        return its + (mine - its).detach()

    return joint


__all__ = ["GRIDS", "HONEST", "MISLED", "Case", "data_of", "margin", "true_accuracies"]
