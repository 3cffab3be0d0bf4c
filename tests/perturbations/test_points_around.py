"""Random points around others, where a search asks for gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rai_toolbox.perturbations._problem import Problem, batches, check_shared_arguments


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None, (0.0, float("inf"))])
def test_points_around_lie_in_the_box_within_half_the_range_and_belong_to_their_datum(bounds):
    x = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) + 0.01
    x = x / x.amax(dim=1, keepdim=True)

    def problem_of(data: Tensor) -> Problem:
        shared = check_shared_arguments(
            nn.Identity(), data, torch.zeros(len(data), dtype=torch.int64), norm="l1", bounds=bounds, targeted=False,
            criterion=None, margin=None, samples=1, batch_size=None, generator=None,
        )  # fmt: skip
        return next(batches(shared))[1]

    points = problem_of(x).around(torch.arange(5), x, 3)
    shift = (points - x).abs()
    assert shift.max() <= 0.5
    assert shift.amax(dim=1).min() > 0.001
    assert bounds is None or points.min() >= 0
    assert bounds != (0.0, 1.0) or points.max() <= 1
    torch.testing.assert_close(problem_of(x[3:4]).around(torch.arange(1), x[3:4], 3), points[3:4], rtol=0, atol=0)
