"""Costly work on cut data: each datum has one owner, the work is even, two exchanges suffice, and no bit changes."""

from __future__ import annotations

import on_ranks_sharing as sharing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks

from rai_toolbox.optim._sharded_data import evened

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize(
    ("size", "kind"), [(2, "rows"), (4, "last"), (4, "rows and columns"), (4, "rows twice"), (4, "replicated rows")]
)
def test_sharded_steps_are_those_of_one_process_bit_for_bit(
    size: int, kind: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue("two_ranks" if size == 2 else "four_ranks")
    assert ranks.run(sharing.sharing_changes_no_bit, kind) == [[]] * size


@pytest.mark.parametrize(("size", "kind"), [(2, "rows"), (4, "replicated rows")])
def test_two_exchanges_and_even_work_whatever_the_number_of_matrices(
    size: int, kind: str, request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue("two_ranks" if size == 2 else "four_ranks")
    for shapes in ([(32, 32)] * 8, [(16, 16)] * 17 + [(24, 32)] * 6 + [(3, 16, 32)] * 3):
        for name in sharing.COSTLY:
            for collectives, own, everybodys in ranks.run(sharing.collectives_and_work, name, kind, shapes):
                assert collectives == 2, name
                assert 0 < own <= 1.3 * everybodys / size, name


@pytest.mark.parametrize("kind", ["last", "rows and columns"])
def test_options_per_datum_and_per_entry_go_to_the_owner(kind: str, four_ranks: Ranks) -> None:
    four_ranks.run(sharing.options_per_datum_go_to_the_owner, kind)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.integers(0, 200), st.integers(1, 50))
def test_things_of_one_cost_are_spread_as_evenly_as_can_be(loads: list[int], n: int, cost: int) -> None:
    counts = evened(loads, n, cost)
    assert sum(counts) == n
    assert min(counts) >= 0
    one_by_one = list(loads)
    for _ in range(n):
        one_by_one[one_by_one.index(min(one_by_one))] += cost
    assert max(load + c * cost for load, c in zip(loads, counts, strict=True)) == max(one_by_one)
