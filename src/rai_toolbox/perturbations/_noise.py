"""Random numbers that belong to a sample: they do not depend on the rest of the batch or on the device.

A counter-based generator: every number is a hash of (the caller's seed, the sample's own bytes, which draw, which
entry).

References
----------
.. [1] J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor

from rai_toolbox.kernels import _hashing
from rai_toolbox.kernels._machine import own_generators
from rai_toolbox.kernels._points import directions, normals, uniforms

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    data, shape (N, D)
    """

    def __init__(self, data: Tensor, seed: int) -> None:
        self._length = data.shape[1]
        bits = data.contiguous().view(_INTEGERS[data.element_size()]).to(torch.int64)
        factors = _hashing.mixed(_hashing.columns(self._length, data.device)) | 1
        # Sums of integers have no rounding: they depend neither on the order nor on the batch.
        self._keys = _hashing.mixed((bits * factors).sum(dim=1) + _hashing.signed(seed * 2 + 1))

    def of_copies(self, rows: Tensor, count: int) -> Noise:
        """Streams for so many copies of rows, other ones for each copy; the first has those of the row."""
        noise, keys = copy(self), self._keys[rows]
        noise._keys = torch.cat((keys, *(_hashing.mixed(keys + number) for number in range(1, count))))
        return noise

    def directions(self, grad: Tensor, rows: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """Gradients of rows, without NaN, those that are zero replaced by random ones; and which these are."""
        return directions(grad, self._keys, rows, stream)

    def uniform(self, rows: Tensor, stream: int) -> Tensor:
        """In [0, 1), float64; shape (len(rows), D). `stream` numbers the draw."""
        return uniforms(self._keys, rows, stream, self._length)

    def normal(self, rows: Tensor, stream: int) -> Tensor:
        """An approximate standard normal (the sum of four uniforms), enough for a random direction; float64."""
        return normals(self._keys, rows, stream, self._length)
