"""Random numbers as a hash of (a key, which draw, which entry), in integer arithmetic, which has one result everywhere.

The finalizer is that of SplitMix64.

References
----------
.. [1] G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signed(x: int) -> int:
    """The integer with a sign that has the same 64 bits."""
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


_GAMMA = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def columns(length: int, device: torch.device) -> Tensor:
    """What entries are told apart by."""
    return torch.arange(1, length + 1, device=device) * _GAMMA


def draw_of(stream: int) -> int:
    """What draws are told apart by: it is added to a key."""
    return signed(stream * _MIX_2)


def mixed(x: Tensor) -> Tensor:
    """A number each bit of which depends on each bit of x; int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(keys: Tensor, draw: int, length: int) -> Tensor:
    """64 random bits for each of `length` entries of each key, shape (len(keys), length)."""
    return mixed(mixed(keys + draw)[:, None] + columns(length, keys.device))


def uniforms(keys: Tensor, draw: int, length: int) -> Tensor:
    """In [0, 1), float64."""
    return _shift_right(bits(keys, draw, length), 11).double() * 2.0**-53


def normals(keys: Tensor, draw: int, length: int) -> Tensor:
    """Near enough to a standard normal for a random direction (the sum of four uniforms), float64."""
    random = bits(keys, draw, length)
    total = sum((random >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
    # Sums of integers again: a library's logarithm may differ in its last bit between the lanes of a vector.
    return (total.double() + 2.0 - 2.0**17) * (3.0**0.5 * 2.0**-16)  # pyright: ignore[reportAttributeAccessIssue]


def _shift_right(x: Tensor, shift: int) -> Tensor:
    """Logical, where torch's own is arithmetic."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)
