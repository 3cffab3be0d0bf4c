"""The built-in model: a small network, trained on the spot on handwritten digits."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

from rai_toolbox.robustness._files import atomic_write
from rai_toolbox.robustness.data._digits import split

_EPOCHS = 20
# Part of the cache's file name: raise it when the recipe below changes.
_RECIPE = 1


def digits_model(seed: int = 0) -> nn.Module:
    """Return a small convolutional network trained on the other scans; training takes seconds and is kept for
    the next time.

    The global random state is left as it was.
    """
    try:
        cached = _cache_file(seed)
    except RuntimeError:  # a user without a home
        cached = Path(os.devnull)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network()
        if not _load(model, cached):
            _train(model, seed)
            _keep(model, cached)
    return model.eval()


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _train(model: nn.Module, seed: int) -> None:
    x, y = (torch.from_numpy(part) for part in split(seed)[:2])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    shuffle = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(x), generator=shuffle).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()


def _cache_file(seed: int) -> Path:
    if folder := os.environ.get("XDG_CACHE_HOME"):
        root = Path(folder)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", "."))
    elif sys.platform == "darwin":
        root = Path("~/Library/Caches").expanduser()
    else:
        root = Path("~/.cache").expanduser()
    # Another release of torch trains to other weights: same seed, same numbers holds for one release.
    key = hashlib.sha256(f"{_RECIPE}:{seed}:{torch.__version__}".encode()).hexdigest()[:12]
    return root / "rai-toolbox" / f"digits-{key}.pt"


def _load(model: nn.Module, path: Path) -> bool:
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # absent or damaged: a cache is only ever a shortcut
        return False
    return True


def _keep(model: nn.Module, path: Path) -> None:
    if str(path) == os.devnull:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(model.state_dict(), file)
    except OSError:
        pass
