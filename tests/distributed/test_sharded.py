"""Sharded parameters: the same steps as in one process, few collectives, and no rank left waiting."""

from __future__ import annotations

import on_ranks_sharded as on_ranks
import on_ranks_training as training
import pytest
from on_ranks_sharded import BUILDS, SOME
from ranks import Ranks

from rai_toolbox import optim

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


def test_every_class_is_covered() -> None:
    classes = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    assert classes <= {name.split()[0] for name in BUILDS}


@pytest.mark.parametrize(
    ("size", "kind", "names"),
    [
        (2, "rows", list(BUILDS)),
        (2, "columns", list(BUILDS)),
        (2, "replicated rows", SOME),
        (4, "rows", list(BUILDS)),
        (4, "last", SOME),
        (4, "replicated rows", SOME),
        (4, "rows and columns", SOME),
        (4, "rows twice", SOME),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_ten_steps_equal_the_single_process_run(
    size: int, kind: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    ranks: Ranks = request.getfixturevalue("two_ranks" if size == 2 else "four_ranks")
    assert set(ranks.run(on_ranks.steps_agree, kind, names, [-1, 1, None])) == {3 * len(names) * len(on_ranks.SHAPES)}


@pytest.mark.parametrize("kind", ["rows", "last"])
def test_an_option_per_datum_or_per_entry_is_cut_like_its_parameter(kind: str, four_ranks: Ranks) -> None:
    four_ranks.run(training.tensor_options_agree, kind)


def test_bounds_may_be_placed_as_their_parameter_where_no_datum_is_cut(two_ranks: Ranks) -> None:
    said = two_ranks.run(training.bounds_that_are_sharded)
    assert all("give it as a plain tensor on every rank" in text for text in said)


def test_norms_of_any_size_infinities_nans_and_zeros_come_out_as_in_one_process(ranks: Ranks) -> None:
    ranks.run(training.extremes_agree)


def test_norms_and_data_may_go_along_one_dimension_of_a_mesh_after_the_other(four_ranks: Ranks) -> None:
    four_ranks.run(training.staged_exchange_agrees)


def test_cut_data_are_gathered_in_buffers_of_bounded_size(two_ranks: Ranks) -> None:
    two_ranks.run(training.small_buffers_agree)


@pytest.mark.parametrize(
    ("name", "kind", "param_ndim", "most"),
    [
        ("L2NormedGradientOptim", "rows", -1, 0),
        ("L2ProjectedOptim", "rows", -1, 0),
        ("L1ProjectedOptim", "rows", 1, 0),
        ("TopQGradientOptimizer", "rows", -1, 1),  # its draws
        ("SignedGradientOptim", "rows and columns", None, 0),
        ("LinfProjectedOptim", "columns", None, 0),
        ("L2NormedGradientOptim", "rows", None, 1),
        ("L2NormedGradientOptim", "columns", 1, 1),
        ("L2NormedGradientOptim", "replicated rows", None, 1),
        ("L2NormedGradientOptim", "rows and columns", None, 1),
        ("L2NormedGradientOptim", "rows twice", None, 1),
        ("L2ProjectedOptim", "rows", None, 2),
        ("L2ProjectedOptim", "replicated rows", None, 2),
        ("L2ProjectedOptim", "rows and columns", None, 2),
        ("L1ProjectedOptim", "rows and columns", None, 3),  # norms, then data to their owners and back
        ("L1BallOptim", "rows", None, 2),
        ("L1qFrankWolfe", "columns", None, 3),  # its draws
    ],
)
def test_a_step_takes_few_collectives_whatever_the_number_of_parameters_and_groups(
    name: str, kind: str, param_ndim: int | None, most: int, four_ranks: Ranks
) -> None:
    for n_params, n_groups in ((1, 1), (40, 3)):
        counts = four_ranks.run(training.collectives_of_a_step, name, kind, param_ndim, n_params, n_groups)
        assert counts == [most] * 4 or (n_params == 1 and counts == [most - 1] * 4)  # one datum is gathered


def test_pending_sums_are_carried_out_first_in_one_collective(ranks: Ranks) -> None:
    for name in ("SignedGradientOptim", "L2NormedGradientOptim", "LargestIsOne"):
        assert set(ranks.run(training.pending_sums, name)) == {1}


def test_a_layer_norm_under_sequence_parallel_steps_as_in_one_process(ranks: Ranks) -> None:
    assert all(ranks.run(training.sequence_parallel_agrees)), "its gradient was not pending: the test shows nothing"


def test_whether_a_step_asks_for_anything_is_decided_together(ranks: Ranks) -> None:
    assert all(ranks.run(training.a_local_zero_does_not_stop_the_others))
