from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(params=[2, 4], ids=["two ranks", "four ranks"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks")
