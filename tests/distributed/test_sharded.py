"""Sharded parameters: the same steps as in one process, few collectives, and no rank left waiting."""

from __future__ import annotations

import on_ranks_sharded as on_ranks
import pytest
from on_ranks_sharded import BUILDS
from ranks import Ranks

from rai_toolbox import optim

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


def test_every_class_is_covered() -> None:
    classes = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    assert classes <= {name.split()[0] for name in BUILDS}


@pytest.mark.parametrize("kind", ["rows", "columns", "last", "replicated rows", "rows and columns", "rows twice"])
@pytest.mark.parametrize("size", [2, 4])
def test_ten_steps_of_every_class_equal_the_single_process_run(
    kind: str, size: int, request: pytest.FixtureRequest
) -> None:
    if size == 2 and kind in ("rows and columns", "rows twice", "last"):
        pytest.skip("needs four ranks to differ from the others")
    ranks: Ranks = request.getfixturevalue("two_ranks" if size == 2 else "four_ranks")
    assert set(ranks.run(on_ranks.steps_agree, kind, list(BUILDS), [-1, 1, None])) == {3 * len(BUILDS) * 6}
