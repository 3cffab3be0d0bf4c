"""DDP, FSDP2, hybrid shards, tensor parallel and distributed checkpoints, with torch's own components."""

from __future__ import annotations

from pathlib import Path

import on_ranks_training as training
import pytest
import torch
from on_ranks_sharded import SOME
from ranks import Ranks, has_fsdp2_on_a_cpu

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]


fsdp2_on_a_cpu = pytest.mark.skipif(not has_fsdp2_on_a_cpu(), reason="this torch's fully_shard does not run on a CPU")


@fsdp2_on_a_cpu
@pytest.mark.parametrize("param_ndim", [-1, 1, None])
def test_fsdp2_with_uneven_shards_trains_as_one_process(param_ndim: int | None, ranks: Ranks) -> None:
    names = training.CLASSES if ranks.size == 2 else [name for name in SOME if " " not in name]
    ranks.run(training.fsdp2_agrees, False, param_ndim, names, False)


@fsdp2_on_a_cpu
def test_fsdp2_layer_by_layer_and_hybrid_shards_train_as_one_process(four_ranks: Ranks) -> None:
    for name in ("L2ProjectedOptim", "L1qNormedGradientOptim", "ChainedParamTransformingOptimizer"):
        four_ranks.run(training.fsdp2_agrees, False, None, [name], True)
        four_ranks.run(training.fsdp2_agrees, True, None, [name], False)


def test_tensor_parallel_layers_train_as_one_process(two_ranks: Ranks) -> None:
    two_ranks.run(training.tensor_parallel_agrees)


def test_replicas_stay_equal_and_train_as_one_process(ranks: Ranks) -> None:
    ranks.run(training.ddp_agrees)


def test_every_rank_draws_what_rank_0_draws_unless_told_otherwise(ranks: Ranks) -> None:
    first, *others = ranks.run(training.draws_are_rank_0s)
    assert len(set(first)) == len(first) == 12
    for rank, shares in enumerate(others, start=1):
        n = 2 + rank
        assert shares[:2] == first[:2]  # both start from rank 0's generator
        assert len(shares) == 3 * 2 * n
        assert shares[-n:] != first[-2:]


def test_solves_on_one_rank_wait_for_no_other(two_ranks: Ranks) -> None:
    two_ranks.run(training.unequal_solves, [1, 4], timeout=60)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_that_fsdp1_has_flattened_are_refused_but_for_entrywise_transforms(
    use_orig_params: bool, two_ranks: Ranks
) -> None:
    for said in two_ranks.run(training.fsdp1_is_refused, use_orig_params):
        assert said.pop("SignedGradientOptim") == ""
        assert all("use torch.distributed.fsdp.fully_shard (FSDP2)" in text for text in said.values())


def test_asking_for_the_optimizer_state_changes_nothing(two_ranks: Ranks) -> None:
    two_ranks.run(training.asking_for_the_state_changes_nothing)


@fsdp2_on_a_cpu
@pytest.mark.parametrize(("name", "steps"), [("projected", 3), ("remembering", 0), ("remembering", 3)])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_on_four(
    name: str, steps: int, two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    expected = two_ranks.run(training.save_in_the_middle, folder, name, steps)[0]
    for got in (four_ranks.run(training.go_on_from, folder, name)[0], _on_one_rank(folder, name)):
        for x, y in zip(expected, got, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def _on_one_rank(folder: str, name: str) -> list[torch.Tensor]:
    one = Ranks(1)
    try:
        return one.run(training.go_on_from, folder, name)[0]
    finally:
        one.stop()


@fsdp2_on_a_cpu
def test_the_whole_state_goes_through_torch_save_and_weights_only(ranks: Ranks) -> None:
    ranks.run(training.full_state_loads_anywhere)
