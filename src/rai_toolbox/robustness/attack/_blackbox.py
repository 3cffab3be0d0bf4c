"""Attacks without gradients. A gradient-based search that is worse than these follows misleading gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.perturbations.losses import margin
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._subject import Subject

# Points per sample in one call of the model.
_TOGETHER = 25
_AT_A_TIME = 4


def noise_breaks(subject: Subject, x: Tensor, target: Tensor, *, norm: Norm, epsilon: Tensor, draws: int) -> Tensor:
    """Say which samples are wrong at some random point on the sphere of radius `epsilon`, clamped to the bounds.

    x, target: samples that the model gets right.
    epsilon, shape (N,): the radius for each.
    draws: how many points for each.

    Returns (N,), bool.
    """
    generator = subject.generator("noise", norm)
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for done in range(0, draws, _TOGETHER):
        many = min(_TOGETHER, draws - done)
        points = x.repeat(many, *[1] * (x.ndim - 1))
        delta = _onto_sphere(_draw(points, norm, epsilon.repeat(many), generator), norm, epsilon.repeat(many))
        wrong = _score(subject, _inside(subject, points, delta), target.repeat(many)) > 0
        broken |= wrong.reshape(many, -1).any(dim=0)
    return broken


def random_search_breaks(
    subject: Subject, x: Tensor, target: Tensor, *, norm: Norm, epsilon: Tensor, queries: int
) -> Tensor:
    """Say which samples `random_search` makes wrong, as a Tensor of bool of shape (N,)."""
    found = random_search(subject, x, target, norm=norm, epsilon=epsilon, queries=queries)
    return _score(subject, found, target) > 0


def random_search(
    subject: Subject, x: Tensor, target: Tensor, *, norm: Norm, epsilon: Tensor, queries: int,
    together: int = _AT_A_TIME,
) -> Tensor:  # fmt: skip
    """Return the worst points of a random search that keeps every change that raises the loss.

    Each query changes a random window of the input, large at first, smaller later. The change of an entry is as large
    as an entry of a point on the sphere is: a proposal keeps what was found outside of its window.

    x, target: samples that the model gets right.
    epsilon, shape (N,): the radius for each.
    queries, together: how many changes to try for each, and how many of them in one call of the model; of these the
        best is kept.

    Returns the shape of `x`.

    References
    ----------
    Andriushchenko, M., Croce, F., Flammarion, N. and Hein, M. (2020). Square Attack. ECCV.
    """
    generator = subject.generator("random search", norm)
    delta = _onto_sphere(_draw(x, norm, epsilon, generator), norm, epsilon)
    best = _score(subject, _inside(subject, x, delta), target)
    points, radii, targets = x.repeat(together, *[1] * (x.ndim - 1)), epsilon.repeat(together), target.repeat(together)
    every = torch.arange(len(x), device=x.device)
    for query in range(0, queries, together):
        share = max(0.02, 0.6 * (1 - query / queries) ** 2)
        window = _window(points.shape, share, generator).to(x.device)
        kept = delta.repeat(together, *[1] * (x.ndim - 1))
        proposal = _onto_sphere(_proposal(points, kept, window, norm, radii, generator), norm, radii)
        scores = _score(subject, _inside(subject, points, proposal), targets).reshape(together, -1)
        score, place = scores.max(dim=0)
        better = score > best
        best = torch.where(better, score, best)
        delta = torch.where(_per_sample(better, x), proposal[place * len(x) + every], delta)
    return _inside(subject, x, delta)


def _score(subject: Subject, x: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(subject.model(x), target).nan_to_num(nan=-torch.inf)


def _inside(subject: Subject, x: Tensor, delta: Tensor) -> Tensor:
    bounds = subject.box.of(x)
    # Clamping moves every entry towards x, which is in the box: no norm grows.
    return x + delta if bounds is None else torch.minimum(torch.maximum(x + delta, bounds[0]), bounds[1])


def _draw(x: Tensor, norm: Norm, epsilon: Tensor, generator: torch.Generator) -> Tensor:
    """Return random changes that are about as large as `epsilon` over the whole input: signs for linf, a Gaussian for
    l2, few large entries for l1 and l0.
    """
    radius = _per_sample(epsilon, x).to(x)
    size = x[0].numel()
    sign = torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0).to(x)
    if norm == "linf":
        return radius * sign
    if norm == "l2":
        return radius / size**0.5 * torch.randn(x.shape, generator=generator).to(x)
    # The mean of the fourth power of a uniform number is 1/5.
    uneven = sign * torch.rand(x.shape, generator=generator).to(x) ** 4
    return uneven * float(x.max() - x.min()) if norm == "l0" else uneven * (5 * radius / size)


def _proposal(
    x: Tensor, delta: Tensor, window: Tensor, norm: Norm, epsilon: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the change found so far with a new draw in the window: in linf a sign for the whole window of a channel
    every other time, else for each entry; in l2 added to what is there.
    """
    fresh = _draw(x, norm, epsilon, generator)
    if norm == "linf" and x.ndim > 2 and float(torch.rand((), generator=generator)) < 0.5:
        fresh = fresh.flatten(2)[..., :1].reshape(*fresh.shape[:2], *[1] * (x.ndim - 2)).expand(x.shape)
    if norm == "l2":
        # As much energy as a third of the whole, over a few entries or over many.
        rows = torch.where(window, fresh, 0.0).flatten(1)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
        return delta + (rows * (0.3 * epsilon[:, None].to(x) / length)).reshape(x.shape)
    return torch.where(window, fresh, delta)


def _onto_sphere(delta: Tensor, norm: Norm, epsilon: Tensor) -> Tensor:
    radius = epsilon[:, None].to(delta)
    rows = delta.flatten(1)
    if norm == "linf":
        return torch.minimum(torch.maximum(rows, -radius), radius).reshape(delta.shape)
    if norm == "l0":
        rank = rows.abs().argsort(dim=1, descending=True).argsort(dim=1)
        return torch.where(rank < radius, rows, 0.0).reshape(delta.shape)
    length = torch.linalg.vector_norm(rows, {"l1": 1.0, "l2": 2.0}[norm], dim=1, keepdim=True)
    return (rows * (radius * (1 - 1e-6) / length.clamp_min(1e-30))).reshape(delta.shape)


def _window(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask, one random window of a sample per row: all channels, a stretch of every other dimension."""
    spatial = shape[2:] if len(shape) > 2 else shape[1:]
    mask = torch.ones(shape[0], *spatial, dtype=torch.bool)
    for axis, length in enumerate(spatial, start=1):
        side = max(1, round(share ** (1 / len(spatial)) * length))
        begin = torch.randint(0, length - side + 1, (shape[0],), generator=generator)
        place = torch.arange(length)
        stretch = (place >= begin[:, None]) & (place < begin[:, None] + side)
        mask &= stretch.reshape(shape[0], *[1] * (axis - 1), length, *[1] * (len(spatial) - axis))
    return mask if len(shape) <= 2 else mask[:, None].expand(shape)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))
