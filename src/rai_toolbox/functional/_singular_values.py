"""Stacks of matrices whose singular values are set to one, or clipped.

Exact results come from the eigenvectors V of AᵀA in float64, for which A V = U Σ, or from the SVD where the data are
float64; the quintic iteration of Newton and Schulz approximates the polar factor by products of matrices alone.

References
----------
.. [1] N. J. Higham, "Functions of Matrices: Theory and Computation", SIAM 2008, chapter 8.
.. [2] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import is_on_cpu, wide_dtype
from rai_toolbox.kernels._threads import share_out

Number: TypeAlias = float | Tensor

# The odd polynomial a x + b x³ + c x⁵ that a step of Newton and Schulz [2]_ applies to each singular value.
_QUINTIC = (3.4445, -4.7750, 2.0315)

# On a CPU, matrices of at most so many entries are multiplied as a stack.
_STACKED_NUMEL = 2**15

# A singular value below this share of the largest counts as zero, where the data have float32's digits or fewer.
_RANK_TOLERANCE = 8 * torch.finfo(torch.float32).eps


def newton_schulz(a: Tensor, steps: int) -> Tensor:
    """Approximate the polar factors of a stack of matrices, shape (N, m, n), by products in bfloat16."""
    # powers of two change no digit, and keep the norm in range
    x = (a / _power_of_two(a)).bfloat16()
    wide = a.shape[1] <= a.shape[2]
    x = x if wide else x.mT
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).bfloat16()
    x = x / torch.where(norm == 0, 1, norm)
    # one product for all where calls are what costs; on a CPU baddbmm is the slower for large matrices
    if len(x) > 1 and shares_calls(x):
        x = _iterated(x, steps, torch.baddbmm)
    else:
        x = torch.stack(share_out(lambda y: _iterated(y, steps, torch.addmm), list(x)))
    return x if wide else x.mT


def shares_calls(stack: Tensor) -> bool:
    """Return whether the matrices of a stack are better multiplied together than one by one."""
    return not is_on_cpu(stack) or stack[0].numel() <= _STACKED_NUMEL


def _iterated(x: Tensor, steps: int, multiply_add: Callable[..., Tensor]) -> Tensor:
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _power_of_two(a: Tensor, work: torch.dtype | None = None) -> Tensor:
    """A power of two near the largest magnitude of each matrix of a stack, shape (N, 1, 1); 1 for a zero matrix."""
    largest = a.detach().abs().amax((1, 2), keepdim=True).to(work or torch.promote_types(a.dtype, torch.float32))
    ordinary = largest.isfinite() & (largest > 0)
    # twice the mantissa lies in [1, 2), so the quotient is a power of two, exact, and within the range
    return torch.where(ordinary, largest / (2 * torch.frexp(largest).mantissa), 1)


def of_singular_values(a: Tensor, epsilon: Number | None) -> Tensor:
    """Set the singular values of a stack of matrices to 1 (those that are not zero), or clip them to `epsilon`."""
    work = wide_dtype(a)
    finite = a.detach().isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    scale = _power_of_two(a, work)
    wide = torch.where(finite, a, 0).to(work) / scale
    if epsilon is None:
        result = _Spectral.apply(wide, None, a.dtype)[0]  # pyright: ignore[reportOptionalSubscript]
        return torch.where(finite, result.to(a.dtype), math.nan)
    radius = torch.as_tensor(epsilon, dtype=work, device=a.device).expand(len(a), 1, 1)
    result, _, _, sigma = _Spectral.apply(wide, radius / scale, a.dtype)  # pyright: ignore
    # a matrix that was clipped and rounded is inside: rounding, and in float64 LAPACK, moved its singular values so far
    digits = 8 + 2 * max(a.shape[-2:]) if a.dtype == torch.float64 else 2 + 0.5 * math.sqrt(min(a.shape[-2:]))
    slack = digits * torch.finfo(a.dtype).eps
    inside = sigma.amax(-1)[:, None, None] * scale <= radius * (1 + slack)
    clipped = (result * scale).to(a.dtype)
    return torch.where(finite, torch.where(inside.detach(), a, clipped), math.nan)


class _Spectral(torch.autograd.Function):
    """f(Σ) in the place of Σ, f(σ) = 1 or min(σ, ε): the result, and U, V, σ of its argument.

    The derivative in the direction E, with D = UᵀEV, is

        U [P∘(D + Dᵀ)/2 + Q∘(D - Dᵀ)/2] Vᵀ + (I - UUᵀ) E V diag(f/σ) Vᵀ;

    P are the divided differences of f, and Q_ij = (f_i + f_j) / (σ_i + σ_j). Nothing divides by σ_i - σ_j = 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, epsilon: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tall = a.mT if a.shape[-2] < a.shape[-1] else a
        by_squares = dtype != torch.float64
        if by_squares:
            squares, v = torch.linalg.eigh(tall.mT @ tall)
            sigma = squares.clamp_min(0).sqrt()
            zero = sigma <= _RANK_TOLERANCE * sigma.amax(-1, keepdim=True)
            whole = tall @ v / torch.where(zero, 1, sigma)[..., None, :]
        else:
            whole, sigma, vh = torch.linalg.svd(tall, full_matrices=False)
            v = vh.mT
            zero = sigma <= max(a.shape[-2:]) * torch.finfo(dtype).eps * sigma.amax(-1, keepdim=True)
        u = torch.where(zero[..., None, :], 0, whole)
        if epsilon is None:
            result = u @ v.mT
            if by_squares:  # one step of Newton's: small singular values lost digits in the squares
                result = 1.5 * result - 0.5 * result @ (result.mT @ result)
        else:
            radius = epsilon[..., 0]
            result = (whole * torch.minimum(sigma, radius)[..., None, :]) @ v.mT
            if by_squares:  # the difference keeps the digits of what is far below the largest
                less = tall - (u * (sigma - radius).clamp_min(0)[..., None, :]) @ v.mT
                result = torch.where(epsilon < 1e-7 * sigma.amax(-1)[..., None, None], result, less)
        sigma = torch.where(zero, 0, sigma)
        return result.mT if tall is not a else result, u, v, sigma

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, epsilon, _ = inputs
        _, u, v, sigma = output
        ctx.mark_non_differentiable(u, v, sigma)
        ctx.save_for_backward(u, v, sigma, *(() if epsilon is None else (epsilon,)))
        ctx.wide = a.shape[-2] < a.shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        u, v, sigma, *rest = ctx.saved_tensors
        h = grads[0].mT if ctx.wide else grads[0]
        d = u.mT @ h @ v
        sums = sigma[..., :, None] + sigma[..., None, :]
        safe = torch.where(sums == 0, 1, sums)
        nonzero = torch.where(sigma == 0, 1, sigma)
        if not rest:  # f = 1 but for σ = 0
            f = (sigma > 0).to(sigma)
            skew = (f[..., :, None] + f[..., None, :]) / safe
            core = skew * (d - d.mT) / 2
            over = f / nonzero
            grad, by_epsilon = torch.zeros_like(h), None
        else:  # the identity less what exceeds ε
            f = (sigma - rest[0][..., 0]).clamp_min(0)
            moved = (f > 0).to(sigma)
            differences = sigma[..., :, None] - sigma[..., None, :]
            close = differences.abs() <= 1e-12 * sums
            sym = torch.where(
                close,
                torch.maximum(moved[..., :, None], moved[..., None, :]),
                (f[..., :, None] - f[..., None, :]) / torch.where(close, 1, differences),
            )
            skew = (f[..., :, None] + f[..., None, :]) / safe
            core = -(sym * (d + d.mT) + skew * (d - d.mT)) / 2
            over = -f / nonzero
            grad = h
            by_epsilon = (d.diagonal(dim1=-2, dim2=-1) * moved).sum(-1)[..., None, None]
        outer = h @ (v * over[..., None, :])
        outer = outer - u @ (u.mT @ outer)
        grad = grad + (u @ core + outer) @ v.mT
        return grad.mT if ctx.wide else grad, by_epsilon, None
