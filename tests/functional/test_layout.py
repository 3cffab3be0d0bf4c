"""What `param_ndim` means: `datum_ndim`, `to_batch`, and the blocks that functions work through."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from rai_toolbox import functional, to_batch
from rai_toolbox.functional import datum_ndim
from rai_toolbox.functional._layout import as_rows, batch_shape, blocks, write_through

SHAPES = [(), (4,), (0,), (3, 5), (3, 0, 2), (2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 1, 2)]


@pytest.mark.parametrize("ndim", range(6))
def test_datum_ndim_counts_trailing_dimensions(ndim: int) -> None:
    assert datum_ndim(ndim, None) == ndim
    for k in range(ndim + 1):
        assert datum_ndim(ndim, k) == k
        if k:
            assert datum_ndim(ndim, -k) == ndim - k
    for bad in (ndim + 1, -ndim - 1, 99, -99):
        with pytest.raises(ValueError, match=rf"{bad}.*{ndim} dimension"):
            datum_ndim(ndim, bad)


@pytest.mark.parametrize("bad", [1.0, "1", True, [1], torch.tensor(1)])
def test_datum_ndim_of_anything_but_an_int_or_none_is_a_type_error(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"param_ndim.*int or None"):
        datum_ndim(3, bad)


@pytest.mark.parametrize("shape", SHAPES)
def test_to_batch_is_a_view_with_leading_dimensions_merged(shape: tuple[int, ...]) -> None:
    x = torch.arange(float(math.prod(shape))).view(shape).requires_grad_()
    x.grad = -x.detach()
    for param_ndim in (None, *range(-len(shape), len(shape) + 1)):
        k = datum_ndim(len(shape), param_ndim)
        batch = to_batch(x, param_ndim)
        assert batch.shape == batch_shape(shape, k)
        assert batch.shape[1:] == (shape[len(shape) - k :] if k else (1,))
        assert not batch.requires_grad
        assert torch.equal(batch.reshape(shape), x)
        assert batch.grad is not None
        assert torch.equal(batch.grad.reshape(shape), x.grad)


def test_what_is_written_to_the_view_and_its_gradient_is_written_to_the_tensor() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    x.grad = torch.zeros(2, 3)
    batch = to_batch(x, None)
    batch.fill_(1.0)
    batch.grad.fill_(2.0)  # type: ignore[union-attr]
    assert torch.equal(x.detach(), torch.ones(2, 3))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


def test_to_batch_of_a_tensor_without_a_gradient_or_of_any_dtype_works() -> None:
    assert to_batch(torch.ones(2, 3), 1).grad is None
    assert to_batch(torch.ones(2, 3, dtype=torch.int64), None).shape == (1, 2, 3)
    assert to_batch((torch.ones(2, requires_grad=True) * 2), None).grad is None  # not a leaf


def test_to_batch_says_so_where_no_view_exists() -> None:
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert to_batch(x, -1).shape == (2, 3, 4, 5)
    with pytest.raises(ValueError, match="contiguous"):
        to_batch(x, 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_as_rows_keeps_the_order_of_the_batch_and_the_entries_of_each_datum(order: tuple[int, ...]) -> None:
    back = torch.tensor(order).argsort().tolist()
    x = torch.arange(24.0).view(2, 3, 4).permute(order).contiguous().permute(back)
    for k in range(4):
        rows = as_rows(x, k)
        if rows is None:
            continue
        assert rows.data_ptr() == x.data_ptr()
        expected = x.reshape(math.prod(x.shape[: 3 - k]), -1)
        assert torch.equal(rows.sort(1).values, expected.sort(1).values)


def test_a_whole_channels_last_tensor_is_one_row_without_a_copy() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for k in (3, 4):
        rows = as_rows(x, k)
        assert rows is not None
        assert rows.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (1, 200), (0, 5), (6, 0)])
@pytest.mark.parametrize("numel", [1, 5, 12, 1000])
def test_blocks_cover_every_entry_once_and_never_cut_a_datum(shape: tuple[int, ...], numel: int) -> None:
    for k in range(len(shape) + 1):
        x = torch.zeros(shape)
        datum = math.prod(shape[len(shape) - k :])
        for block in blocks(x, k, numel):
            block += 1
            assert block.numel() <= max(numel, datum) or x.numel() == 0
            assert datum == 0 or block.numel() % datum == 0
        assert (x == 1).all()


def test_write_through_gives_memory_only_to_what_shares_it_with_itself() -> None:
    x = torch.arange(3.0).expand(2, 3)
    assert write_through(x) is x
    x[0] += 1
    assert x.tolist() == [[1, 2, 3], [0, 1, 2]]
    y = torch.ones(2, 3)
    pointer = y.data_ptr()
    assert write_through(y).data_ptr() == pointer
    assert write_through(torch.ones(1).expand(1, 1)).shape == (1, 1)


FUNCTIONS = [
    functional.normalize_,
    functional.project_l1_ball_,
    functional.project_l2_ball_,
    functional.project_linf_ball_,
    functional.project_simplex_,
    functional.top_q_,
    functional.signed_top_q_,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_tensor_too_large_for_one_block_is_treated_like_its_rows_one_by_one(function: Any) -> None:
    argument = () if function is functional.normalize_ else (0.75,)
    x = torch.randn(5, 2**19 + 3, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([function(row.clone()[None], *argument)[0] for row in x])
    torch.testing.assert_close(function(x, *argument), rows, rtol=1e-6, atol=1e-9)
