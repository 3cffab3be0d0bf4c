"""How much memory a solve of large inputs holds, counted in tensors as they come and go."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rai_toolbox.perturbations import minimum_norm, worst_case

BATCH = (8, 3, 224, 224)
# What a solve takes, and one more: among other tests a batch may be held until Python next looks for circles.
MOST = {
    minimum_norm: {"linf": 8.5, "l2": 8.5, "l1": 10, "l0": 10},
    worst_case: {"linf": 13.5, "l2": 13.5, "l1": 11.5, "l0": 14.5},
}


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators have returned and somebody still holds; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("solve", [minimum_norm, worst_case])
def test_a_batch_of_large_images_takes_a_bounded_multiple_of_its_size(solve, norm):
    torch.manual_seed(0)
    x = torch.rand(BATCH)
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 4))
    y = model(x).argmax(1).detach()
    options = {"epsilon": 1e-3 if norm != "l0" else 2} if solve is worst_case else {}
    gc.collect()

    def peak() -> int:
        with Held() as held:
            solve(model, x, y, norm=norm, bounds=(0, 1), steps=8, restarts=18, **options)
        return held.peak

    # A thread of its own has none of the memory that earlier tests have left to be used again.
    with ThreadPoolExecutor(1) as alone:
        taken = alone.submit(peak).result()
    assert x.nbytes < taken < MOST[solve][norm] * x.nbytes, taken / x.nbytes
