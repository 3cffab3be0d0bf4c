"""The built-in data: handwritten digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rai_toolbox._extras import install_command
from rai_toolbox.robustness._errors import InputError
from rai_toolbox.robustness.data._rows import ArrayRows
from rai_toolbox.robustness.data._samples import Samples

_HELD_OUT = 360


def digits_samples(seed: int = 0) -> Samples:
    """Return 360 of the 1,797 scans of handwritten digits that scikit-learn ships, (N, 1, 8, 8) in [0, 1].

    They are the ones that `digits_model` of the same seed was not trained on.
    """
    _, _, x, y = split(seed)
    return Samples(ArrayRows(x), y, class_names=tuple(str(digit) for digit in range(10)))


def split(seed: int) -> tuple[NDArray[Any], ...]:
    """Return inputs and labels to train on, and those held out, in a random order of this seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(f"the data set digits needs scikit-learn: {install_command('demo')}") from None
    bunch: Any = load_digits()
    x = (bunch.images / 16).astype(np.float32)[:, None]
    y = bunch.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    train, held_out = order[_HELD_OUT:], order[:_HELD_OUT]
    return x[train], y[train], x[held_out], y[held_out]
