"""Random numbers that belong to a sample: they do not depend on the rest of the batch or on the device.

A counter-based generator: every number is a hash of (the caller's seed, the sample's own bytes, which draw, which
entry), in integer arithmetic, which has one result everywhere. The finalizer is that of SplitMix64.

References
----------
.. [1] G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
.. [2] J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rai_toolbox.kernels._machine import own_generators

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def draw_seed(generator: torch.Generator | None) -> int:
    """Return one number from the generator, or a constant without one: results can be repeated."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers, on the CPU and on `device`, inside the block; restore them after it.

    For models, initializers and optimizers that draw them.
    """
    own = own_generators(device)
    with torch.random.fork_rng(devices=own):
        # torch.manual_seed would seed every other device too, which nothing restores.
        torch.default_generator.manual_seed(seed)
        for each in own:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


class Noise:
    """A stream of random numbers for each row of a matrix.

    Parameters
    ----------
    data : Tensor, shape (N, D)
    seed : int
    """

    def __init__(self, data: Tensor, seed: int) -> None:
        self._columns = torch.arange(1, data.shape[1] + 1, device=data.device) * _GAMMA
        bits = data.contiguous().view(_INTEGERS[data.element_size()]).to(torch.int64)
        # Sums of integers have no rounding: they depend neither on the order nor on the batch.
        self._keys = _mix((bits * (_mix(self._columns) | 1)).sum(dim=1) + _signed((seed * 2 + 1) % 2**64))

    def bits(self, rows: Tensor, stream: int) -> Tensor:
        """64 random bits per entry of the given rows, shape (len(rows), D); `stream` numbers the draw."""
        start = _mix(self._keys[rows] + _signed(stream * _MIX_2 % 2**64))
        return _mix(start[:, None] + self._columns)

    def uniform(self, rows: Tensor, stream: int) -> Tensor:
        """In [0, 1), float64."""
        return _shift_right(self.bits(rows, stream), 11).double() * 2.0**-53

    def normal(self, rows: Tensor, stream: int) -> Tensor:
        """An approximate standard normal (the sum of four uniforms), enough for a random direction; float64."""
        bits = self.bits(rows, stream)
        total = sum((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48))
        # Sums of integers again: a library's logarithm may differ in its last bit between the lanes of a vector.
        return (total.double() + 2.0 - 2.0**17) * (3.0**0.5 * 2.0**-16)  # pyright: ignore[reportAttributeAccessIssue]
