"""Models with the outputs of another and a backward pass of their own, for the solvers to attack where its gradient
is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

#: At most so many directions are looked along for one gradient.
_DIRECTIONS = 128


def length_of_steps(norm: str, epsilon: float, size: int, width: float, *, single: bool) -> float:
    """Return the Euclidean length of the changes whose differences tell of the slope within `epsilon` in a norm.

    size: entries of an input.
    width: of the data.
    single: whether one entry changes, or all do.
    """
    if norm == "l0":
        return 0.3 * width
    if single:
        return min(0.3 * epsilon, 0.3 * width)
    return 0.3 * epsilon * (size**0.5 if norm == "linf" else 1.0)


def directions(size: int, count: int, generator: torch.Generator, *, single: bool) -> Tensor:
    """Return orthonormal directions as rows, at most `size`: of single entries, or random ones."""
    count = min(size, count)
    if single:
        chosen = torch.randperm(size, generator=generator)[:count]
        return torch.zeros(count, size).scatter(1, chosen[:, None], 1.0)
    basis, _ = torch.linalg.qr(torch.randn(size, count, generator=generator))
    return basis.T.contiguous()


def by_differences(
    model: Function,
    *,
    step: float,
    generator: torch.Generator,
    single: bool = False,
    count: int = _DIRECTIONS,
    rows: int = 4096,
) -> Function:
    """Return the model with a gradient from central differences.

    step: the Euclidean length of the changes.
    generator: of the directions, anew at every question.
    single: whether each direction is that of one entry.
    count: directions per question, at most; one needs two forward passes.
    rows: at most so many inputs go through the model at a time.
    """  # fmt: skip

    def gradient(x: Tensor, incoming: Tensor) -> Tensor:
        flat = x.flatten(1)
        basis = directions(flat.shape[1], count, generator, single=single).to(flat)
        total = torch.zeros_like(flat)
        for part in basis.split(max(1, rows // (2 * len(flat)))):
            shifted = torch.stack([flat + step * part[:, None], flat - step * part[:, None]])
            with torch.no_grad():
                out = model(shifted.reshape(-1, *x.shape[1:]))
            up, down = out.reshape(2, len(part), len(flat), -1)
            slope = ((up - down) * incoming.reshape(len(flat), -1)).nan_to_num(0.0, 0.0, 0.0).sum(dim=-1) / (2 * step)
            total += slope.to(flat).T @ part
        return (total * (flat.shape[1] / len(basis))).reshape(x.shape)

    return _with_backward(model, gradient)


def with_gradient_of(model: Function, other: Function) -> Function:
    """Return the model with the gradient of another one."""

    def gradient(x: Tensor, incoming: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad((other(leaf) * incoming).sum(), leaf)
        return grad

    return _with_backward(model, gradient)


def _with_backward(model: Function, gradient: Callable[[Tensor, Tensor], Tensor]) -> Function:
    class Substituted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return model(x)

        @staticmethod
        def backward(ctx: Any, *incoming: Tensor) -> Any:
            return gradient(ctx.saved_tensors[0], incoming[0])

    return lambda x: Substituted.apply(x)  # type: ignore[return-value]


def random_changes(norm: str, shape: torch.Size, count: int, generator: torch.Generator) -> Tensor:
    """Return random changes of an input that have length 1 in a norm: all entries in linf, a Gaussian in l2, some
    sixteenth of the entries in l1 and l0, where they have length 1 in l1.
    """
    size = shape.numel()
    noise = torch.randn(count, size, generator=generator)
    if norm == "linf":
        rows = torch.where(noise < 0, -1.0, 1.0)
    elif norm == "l2":
        rows = noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    else:
        few = torch.rand(count, size, generator=generator).argsort(dim=1) < max(1, size // 16)
        rows = noise * few
        rows = rows / rows.abs().sum(dim=1, keepdim=True).clamp_min(1e-30)
    return rows.reshape(count, *shape)
