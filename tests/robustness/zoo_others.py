"""More models of the zoo, of other constructions: defences mixed with each other, honest networks of other kinds."""

from __future__ import annotations

import numpy as np
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import (
    Attention,
    Case,
    Wrapped,
    blur,
    images,
    mlp,
    plain,
    relu,
    seeded,
    straight_through,
    train,
    with_backward,
)
from zoo import _case as case
from zoo import _copy as copy
from zoo import _honest as honest

tanh = seeded(lambda: train(mlp(64, 40, 10, seed=11), seed=11))
gelu = seeded(lambda: train(mlp(64, 64, 32, 10, activation=nn.GELU, seed=7), seed=7, lr=0.01))


def dithered(x: Tensor, levels: float = 6.0) -> Tensor:
    """Rounded, each pixel from another offset."""
    phase = torch.rand(64, generator=torch.Generator().manual_seed(5)).reshape(1, 1, 8, 8).to(x)
    return ((x * levels + phase).floor() - phase + 0.5) / levels


def dithered_partly_straight(x: Tensor) -> Tensor:
    """Dithered, with a gradient for a third of the pixels alone."""
    third = (torch.arange(64).reshape(1, 1, 8, 8) % 3 == 0).to(x)
    return third * straight_through(dithered)(x) + (1 - third) * (dithered(x).detach() + 0.02 * (x - x.detach()))


class Scaled(nn.Module):
    """The gradient of each hidden feature is multiplied by a number of its own."""

    def __init__(self, hidden: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 48), nn.Linear(48, 10)
        generator = torch.Generator().manual_seed(3)
        factor = torch.exp(1.5 * torch.randn(64, generator=generator))
        factor[torch.rand(64, generator=generator) < 0.3] *= -0.5
        self.register_buffer("factor", factor)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.first(x.flatten(1)))
        if self.hidden and not self.training:
            factor = self.get_buffer("factor").to(features)
            features = with_backward(lambda h: h.clone(), lambda h, grad: grad * factor)(features)
        return self.third(F.relu(self.second(features)))

    def honest(self) -> Scaled:
        return copy(self, hidden=False)


class Lookup(nn.Module):
    """Pixels as entries of a table, and a faint direct path, which alone has a gradient."""

    def __init__(self, levels: int = 9, width: int = 6, between: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(levels, width)
        with torch.no_grad():
            self.table.weight.copy_(torch.cumsum(0.35 * torch.randn(levels, width), 0))
        self.direct, self.first, self.second = nn.Linear(64, 48), nn.Linear(64 * width, 48), nn.Linear(48, 10)
        self.levels, self.between = levels, between

    def forward(self, x: Tensor) -> Tensor:
        at = x.flatten(1).clamp(0, 1) * (self.levels - 1)
        entries = self.table(at.round().long())
        if self.between:
            low = at.detach().floor().clamp(0, self.levels - 2)
            part = (at - low)[..., None]
            soft = self.table(low.long()) * (1 - part) + self.table(low.long() + 1) * part
            entries = soft + (entries - soft).detach()
        return self.second(torch.tanh(self.first(entries.flatten(1)) + 0.1 * self.direct(x.flatten(1))))

    def honest(self) -> Lookup:
        return copy(self, between=True)


def pulled(x: Tensor, hidden: bool = True) -> Tensor:
    """Moved towards the nearest of some images; where that is, the gradient does not know."""
    train_x = images()[0]
    some = train_x[torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))[:80]].flatten(1).to(x)
    rows = x.flatten(1)
    moved = 0.6 * rows + 0.4 * some[torch.cdist(rows, some).argmin(dim=1)]
    if hidden:
        change = rows - rows.detach()
        moved = moved.detach() + 0.2 * change.roll(9, -1) + 0.1 * change
    return moved.reshape(x.shape)


class Switched(nn.Module):
    """A network whose gradient is hidden where the input is rougher than images are."""

    def __init__(self, net: nn.Module, hidden: bool = True) -> None:
        super().__init__()
        self.net, self.hidden = net, hidden

    def forward(self, x: Tensor) -> Tensor:
        rough = (x - blur(x)).flatten(1).square().mean(dim=1).sqrt()
        smooth = (rough < 0.155).reshape(-1, 1, 1, 1).to(x.dtype)
        if self.hidden:
            x = smooth * x + (1 - smooth) * (x.detach() + 0.1 * (x - x.detach()).flip(-2))
        return self.net(x)


class Ensemble(nn.Module):
    """The mean of networks, of which some may be detached."""

    def __init__(self, *detached: int) -> None:
        super().__init__()
        self.nets, self.detached = nn.ModuleList([plain(), tanh(), gelu()]), detached

    def forward(self, x: Tensor) -> Tensor:
        outputs = [net(x.detach() if number in self.detached else x) for number, net in enumerate(self.nets)]
        return torch.stack(outputs).mean(dim=0)


def clamped_log(out: Tensor) -> Tensor:
    return (25 * out).softmax(dim=1).clamp_min(1e-7).log()


scaled = seeded(lambda: train(Scaled(), seed=3))
lookup = seeded(lambda: train(Lookup(), lr=0.01, steps=90, seed=4))


class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers, self.head = nn.Parameter(images()[0][:60].flatten(1).clone()), nn.Linear(60, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.exp(-0.4 * torch.cdist(x.flatten(1), self.centers).square()))


class RoundedFeatures(nn.Module):
    """Features in few levels, followed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 72), nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.first(x.flatten(1)))
        return self.second(features if self.training else straight_through(lambda f: (f * 3).round() / 3)(features))


def three_classes() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(3).normal(size=(80, 6)).astype(np.float32)
    return x, np.digitize(x[:, 0] + 0.6 * x[:, 1] ** 2 - 0.5, [0.0, 0.8]).astype(np.int64)


def three_classes_net() -> nn.Module:
    x, y = (torch.from_numpy(part) for part in three_classes())
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def trained_convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    return train(net, attack="l2", steps=100, lr=0.01)


def two_detached(out: Tensor) -> Tensor:
    """Of two classes the outputs have no gradient."""
    return torch.cat([out[:, :3], out[:, 3:4].detach(), out[:, 4:8], out[:, 8:9].detach(), out[:, 9:]], dim=1)


MISLED: dict[str, Case] = {
    **zoo.MISLED,
    "dithered, a third straight, L2": case(
        "l2", lambda: Wrapped(tanh(), dithered_partly_straight), lambda: Wrapped(tanh(), straight_through(dithered))
    ),
    "features' gradients scaled, L2": case("l2", scaled, lambda: scaled().honest()),
    "features' gradients scaled, L1": case("l1", scaled, lambda: scaled().honest()),
    "a table of pixels, L2": case("l2", lookup, lambda: lookup().honest()),
    "a table of pixels, Linf": case("linf", lookup, lambda: lookup().honest()),
    "pulled to images, L2": case(
        "l2", lambda: Wrapped(gelu(), pulled), lambda: Wrapped(gelu(), lambda x: pulled(x, False)), gelu
    ),
    "hidden away from images, L2": case("l2", lambda: Switched(plain()).eval(), lambda: Switched(plain(), False)),
    "hidden away from images, Linf": case("linf", lambda: Switched(relu()).eval(), lambda: Switched(relu(), False)),
    "one of an ensemble detached, Linf": case("linf", lambda: Ensemble(1).eval(), lambda: Ensemble().eval()),
    "log of a clamped softmax, L2": case("l2", lambda: Wrapped(gelu(), after=clamped_log), gelu),
    "two classes detached, Linf": case("linf", lambda: Wrapped(relu(), after=two_detached), relu),
}

HONEST: dict[str, Case] = {
    **zoo.HONEST,
    "convolutions trained on attacks, Linf": honest("linf", trained_convolutions),
    "radial basis, L2": honest("l2", lambda: train(RadialBasis(), steps=120)),
    "deep, L2": honest(
        "l2", lambda: train(mlp(64, *[48] * 5, 10, activation=nn.LeakyReLU, seed=31), lr=0.005, steps=120)
    ),
    "ensemble, L2": honest("l2", lambda: Ensemble().eval()),
    "straight-through features, L2": honest("l2", lambda: train(RoundedFeatures(), seed=6)),
    "transformer in bfloat16, L2": honest("l2", lambda: train(Attention(), steps=90, lr=0.01, seed=8).bfloat16()),
    "two classes trained on attacks, Linf": honest(
        "linf", lambda: train(mlp(64, 32, 1, activation=nn.ReLU), two=True, attack="linf", steps=100),
        data=zoo._two_classes,
    ),
    "three classes of a table, L1": honest(
        "l1", three_classes_net, data=three_classes, options={"epsilons": [0.1, 0.3, 0.6]}
    ),
}  # fmt: skip
