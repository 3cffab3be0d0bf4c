"""A transform whose kind nobody knows is refused where it is made."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rai_toolbox.kernels._factors import NormFactor
from rai_toolbox.optim._transforms import Entrywise


@pytest.mark.parametrize("kind", ["soft-threshold", "Sign", None])
def test_an_entrywise_transform_of_another_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f'must be "sign" or "clamp", got {re.escape(repr(kind))}: write .*PerDatum'):
        Entrywise(kind)


@pytest.mark.parametrize("kind", ["sphere", "Ball", None])
def test_a_factor_of_another_kind_is_refused(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=f'must be "normalize" or "ball", got {re.escape(repr(kind))}: write .*PerDatum'
    ):
        NormFactor(kind, 2, 1.0)
