"""Attacks without gradients. A gradient-based search that is worse than these follows misleading gradients."""

from __future__ import annotations

import torch

from rai_toolbox.perturbations.losses import margin
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._stages import AttackContext

__all__ = ["noise_breaks", "random_search_breaks"]


def noise_breaks(
    context: AttackContext, x: torch.Tensor, target: torch.Tensor, *, norm: Norm, epsilon: float, draws: int
) -> torch.Tensor:
    """Say which samples some random point on the sphere of radius `epsilon` (cut to the bounds) makes wrong.

    Parameters
    ----------
    x, target : Tensor
        Samples that the model gets right.
    draws : int
        How many points for each.

    Returns
    -------
    Tensor of bool, shape (N,)
    """
    generator = context.generator("noise", norm)
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(draws):
        delta = _onto_sphere(_draw(x, norm, epsilon, generator), norm, epsilon)
        broken |= _score(context, _inside(context, x, delta), target) > 0
    return broken


def random_search_breaks(
    context: AttackContext, x: torch.Tensor, target: torch.Tensor, *, norm: Norm, epsilon: float, queries: int
) -> torch.Tensor:
    """Say which samples a random search that keeps what raises the loss makes wrong.

    Each query changes a random window of the input, large at first, smaller later.

    Parameters
    ----------
    x, target : Tensor
        Samples that the model gets right.
    queries : int
        How many changes to try for each.

    Returns
    -------
    Tensor of bool, shape (N,)

    References
    ----------
    Andriushchenko, M., Croce, F., Flammarion, N. and Hein, M. (2020). Square Attack. ECCV.
    """
    generator = context.generator("random search", norm)
    delta = _onto_sphere(_draw(x, norm, epsilon, generator), norm, epsilon)
    best = _score(context, _inside(context, x, delta), target)
    for query in range(queries):
        share = max(0.02, 0.6 * (1 - query / queries) ** 2)
        window = _window(x.shape, share, generator).to(x.device)
        fresh = _draw(x, norm, epsilon, generator)
        # In the window a new draw; outside of it what was found so far.
        proposal = _onto_sphere(torch.where(window, fresh, delta), norm, epsilon)
        score = _score(context, _inside(context, x, proposal), target)
        better = score > best
        best = torch.where(better, score, best)
        delta = torch.where(_per_sample(better, x), proposal, delta)
    return best > 0


def _score(context: AttackContext, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return margin(context.model(x), target).nan_to_num(nan=-torch.inf)


def _inside(context: AttackContext, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    bounds = context.box.of(x)
    # Clamping moves every entry towards x, which is in the box: no norm grows.
    return x + delta if bounds is None else torch.minimum(torch.maximum(x + delta, bounds[0]), bounds[1])


def _draw(x: torch.Tensor, norm: Norm, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Return random changes: signs for linf, few large entries for l0 and l1, a Gaussian for l2."""
    random = torch.rand(x.shape, generator=generator).to(x)
    sign = torch.where(random < 0.5, -1.0, 1.0).to(x)
    if norm == "linf":
        return epsilon * sign
    if norm == "l2":
        return torch.randn(x.shape, generator=generator).to(x)
    return sign * torch.rand(x.shape, generator=generator).to(x) ** 4 * float(x.max() - x.min())


def _onto_sphere(delta: torch.Tensor, norm: Norm, epsilon: float) -> torch.Tensor:
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    rows = delta.flatten(1)
    if norm == "l0":
        count = min(rows.shape[1], int(epsilon))
        kept = torch.zeros_like(rows).scatter(1, rows.abs().topk(count, dim=1).indices, 1.0)
        return (rows * kept).reshape(delta.shape)
    length = torch.linalg.vector_norm(rows, {"l1": 1.0, "l2": 2.0}[norm], dim=1, keepdim=True)
    return (rows * (epsilon * (1 - 1e-6) / length.clamp_min(1e-30))).reshape(delta.shape)


def _window(shape: torch.Size, share: float, generator: torch.Generator) -> torch.Tensor:
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


def _per_sample(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))
