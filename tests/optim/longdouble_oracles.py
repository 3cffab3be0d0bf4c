"""What every transform should give, in 80-bit arithmetic: matrices of numpy longdouble, one datum a row.

The range of a longdouble holds every power that a norm of float64 needs, and its 64 bits leave 11 beyond float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch

LD = np.longdouble
TINY = torch.finfo(torch.float32).tiny


def rows_of(x: torch.Tensor, k: int) -> np.ndarray:
    """`x` as a matrix with one datum (its last k dimensions) a row."""
    n = math.prod(x.shape[: x.ndim - k])
    return x.detach().double().reshape(n, math.prod(x.shape[x.ndim - k :])).numpy().astype(LD)


def norms(x: np.ndarray, p: float) -> np.ndarray:
    a = np.abs(x)
    if x.shape[1] == 0:
        return np.zeros((x.shape[0], 1), LD)
    if p == math.inf:
        return a.max(1, keepdims=True)
    top = a.max(1, keepdims=True)
    top = np.where((top == 0) | ~np.isfinite(top), LD(1), top)
    return top * ((a / top) ** LD(p)).sum(1, keepdims=True) ** (LD(1) / LD(p))


def normalized(x: np.ndarray, p: float, eps: float = TINY) -> np.ndarray:
    n = np.maximum(norms(x, p), LD(eps))
    return np.where(x == 0, LD(0), x / np.where(n == 0, LD(1), n))


def on_sphere(x: np.ndarray, epsilon: float) -> np.ndarray:
    """The nearest point of the sphere; epsilon times the first axis for zero."""
    z = normalized(x, 2, 0.0) * LD(epsilon)
    z[(x == 0).all(1), :1] = epsilon
    return z


def largest(x: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` entries of largest magnitude of each row, the first among equals."""
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, np.argsort(-np.abs(x), axis=1, kind="stable")[:, :count], True, 1)
    return mask


def top_q(x: np.ndarray, q: float) -> np.ndarray:
    return np.where(largest(x, round((1 - q) * x.shape[1])), x, LD(0))


def signed_top_q(x: np.ndarray, q: float) -> np.ndarray:
    s = np.sign(top_q(x, q))
    return s / np.maximum(np.abs(s).sum(1, keepdims=True), 1)


def l1_vertex(x: np.ndarray) -> np.ndarray:
    """±1 on the largest entry: the negative of the oracle of the L1 ball."""
    if x.shape[1] == 0:
        return x
    return np.where(largest(x, 1), np.where(x < 0, LD(-1), LD(1)), LD(0))


def _level(depth: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Solve Σ max(level - depth, 0) = total for each row."""
    d = np.sort(depth, axis=1)
    candidates = (total + d.cumsum(1)) / np.arange(1, d.shape[1] + 1).astype(LD)
    last = np.maximum((d < candidates).sum(1, keepdims=True), 1) - 1
    return np.take_along_axis(candidates, last, 1)


def on_simplex(x: np.ndarray, total: float | np.ndarray) -> np.ndarray:
    if x.shape[1] == 0:
        return x
    total = np.broadcast_to(np.asarray(total, LD), (x.shape[0], 1))
    depth = x.max(1, keepdims=True) - x
    return np.maximum(_level(depth, total) - depth, LD(0))


def in_l1_ball(x: np.ndarray, epsilon: float | np.ndarray) -> np.ndarray:
    if x.shape[1] == 0:
        return x
    epsilon = np.asarray(epsilon, LD)
    shrunk = np.copysign(on_simplex(np.abs(x), np.where(np.isinf(epsilon), LD(1), epsilon)), x)
    return np.where(norms(x, 1) <= epsilon, x, shrunk)


def in_l2_ball(x: np.ndarray, epsilon: float | np.ndarray) -> np.ndarray:
    epsilon = np.asarray(epsilon, LD)
    n = norms(x, 2)
    shrunk = x / np.where(n == 0, LD(1), n) * np.where(np.isinf(epsilon), LD(1), epsilon)
    return np.where(n <= epsilon, x, shrunk)


def clamped(x: np.ndarray, low: float | np.ndarray | None, high: float | np.ndarray | None) -> np.ndarray:
    x = x if low is None else np.maximum(x, np.asarray(low, LD))
    return x if high is None else np.minimum(x, np.asarray(high, LD))


def ulps(dtype: torch.dtype, exact: np.ndarray) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` at each entry of `exact`."""
    info = torch.finfo(dtype)
    low = int(math.log2(info.tiny))
    exponent = np.frexp(np.abs(exact))[1] - 1
    return np.ldexp(LD(info.eps), np.clip(np.where(exact == 0, low, exponent), low, None))


def error_in_ulp(result: torch.Tensor, exact: np.ndarray, k: int, *, of_datum: bool = False) -> float:
    """The largest error in units of the last place of the entry's exact value.

    `of_datum` takes the last place of the largest entry of the datum: for projections that subtract.
    """
    if exact.size == 0:
        return 0.0
    scale = ulps(result.dtype, exact)
    if of_datum:
        scale = scale.max(1, keepdims=True)
    error = np.abs(rows_of(result, k) - exact) / scale
    return float(np.where(np.isnan(error), np.inf, error).max())
