"""Small models and data that the tests of the evaluation share."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

# Many small tensors on few cores, and processes of their own in some tests.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """The built-in model is trained for these tests, not found in the user's home."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _own_path(monkeypatch):
    """What a test's own modules were found in is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def digits():
    """The built-in data: x (N, 1, 8, 8), y (N,)."""
    from rai_toolbox.robustness import load_data

    samples = load_data("digits")
    return samples.inputs(0, len(samples)).numpy(), samples.targets


@pytest.fixture(scope="session")
def digits_net():
    """The built-in model."""
    from rai_toolbox.robustness import load_model

    return load_model("digits")


@pytest.fixture(scope="session")
def small_net(digits):
    """A smooth network that knows the digits, cheaper than the built-in one."""
    x, y = (torch.from_numpy(part) for part in digits)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture
def blobs():
    """Two classes in the plane, on either side of x0 = 0: the distance to the nearest error is known."""
    x = np.linspace(-1, 1, 40, dtype=np.float32)
    return np.stack([x, np.zeros_like(x)], axis=1), (x > 0).astype(np.int64)


@pytest.fixture
def half_plane():
    """The classifier of `blobs`."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    return model
