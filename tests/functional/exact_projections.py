"""Projections of short vectors in exact arithmetic: rational numbers, and one square root at 300 bits."""

from __future__ import annotations

import itertools
from fractions import Fraction

import mpmath
import torch

INF = float("inf")
_CONTEXT = mpmath.mp.clone()
_CONTEXT.prec = 300


def project(x: list[float], epsilon: float, p: float, lower: list[float], upper: list[float]) -> list[float]:
    """The nearest point of {‖z‖_p ≤ epsilon, lower ≤ z ≤ upper}; all finite but the bounds; p in {1, 2, inf}."""
    eps = Fraction(epsilon)
    xs = [Fraction(v) for v in x]
    big = 2 * (eps + sum((abs(v) for v in xs), Fraction(0))) + 1
    lo = [max(Fraction(v), -big) if v != -INF else -big for v in lower]
    hi = [min(Fraction(v), big) if v != INF else big for v in upper]
    if p == INF:
        return [float(min(max(v, l, -eps), h, eps)) for v, l, h in zip(xs, lo, hi, strict=True)]

    clamp = [lambda v, l=l, h=h: min(max(v, l), h) for l, h in zip(lo, hi, strict=True)]
    if p == 1:

        def at(theta: Fraction) -> list[Fraction]:
            shrunk = [(1 if v > 0 else -1) * max(abs(v) - theta, Fraction(0)) for v in xs]
            return [c(v) for c, v in zip(clamp, shrunk, strict=True)]

        def norm(z: list[Fraction]) -> Fraction:
            return sum((abs(v) for v in z), Fraction(0))

        radius = eps
        kinks = {Fraction(0), *(abs(v) for v in xs)}
        kinks |= {abs(v) - abs(b) for v, l, h in zip(xs, lo, hi, strict=True) for b in (l, h)}
        ordered = sorted(k for k in kinks if k >= 0)
    else:

        def at(theta: Fraction) -> list[Fraction]:  # theta = 1 - t
            return [c(v * (1 - theta)) for c, v in zip(clamp, xs, strict=True)]

        def norm(z: list[Fraction]) -> Fraction:
            return sum((v * v for v in z), Fraction(0))

        radius = eps * eps
        kinks = {Fraction(0), Fraction(1)}
        kinks |= {1 - b / v for v, l, h in zip(xs, lo, hi, strict=True) if v for b in (l, h)}
        ordered = sorted(k for k in kinks if 0 <= k <= 1)

    if norm(at(Fraction(0))) <= radius:
        return [float(v) for v in at(Fraction(0))]
    left, right = next((a, b) for a, b in itertools.pairwise(ordered) if norm(at(b)) <= radius)
    start, end = norm(at(left)), norm(at(right))
    if p == 1:
        theta = left + (right - left) * (start - radius) / (start - end) if start != end else right
        return [float(v) for v in at(theta)]
    # between two kinks the squared norm is held + t² free
    t0, t1 = 1 - left, 1 - right
    free = (start - end) / (t0 * t0 - t1 * t1)
    square = (radius - (start - free * t0 * t0)) / free
    t = _CONTEXT.sqrt(_CONTEXT.mpf(square.numerator) / square.denominator)
    result = []
    for v, l, h in zip(xs, lo, hi, strict=True):
        scaled = t * _CONTEXT.mpf(v.numerator) / v.denominator
        low, high = (_CONTEXT.mpf(b.numerator) / b.denominator for b in (l, h))
        result.append(float(min(max(scaled, low), high)))
    return result


def rows(x: torch.Tensor, epsilon: float, p: float, lower: float | torch.Tensor, upper: float | torch.Tensor):
    """`project` of every row of a matrix; float64."""
    lo = torch.as_tensor(lower, dtype=torch.float64).expand(x.shape).tolist()
    hi = torch.as_tensor(upper, dtype=torch.float64).expand(x.shape).tolist()
    found = [project(a, epsilon, p, b, c) for a, b, c in zip(x.double().tolist(), lo, hi, strict=True)]
    return torch.tensor(found, dtype=torch.float64).reshape(x.shape)
