"""One datum that is larger than the blocks that a step works on: the same results, by pieces."""

from __future__ import annotations

import pytest
import torch
from tests.functional.tensor_layouts import DTYPES

from rai_toolbox.functional import _scaling, normalize, project_l2_ball
from rai_toolbox.optim._transforms import l2_projection

SIZE = 2**21 + 3


def spread(dtype: torch.dtype, scale: float) -> torch.Tensor:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    return (x * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_a_norm_that_nobody_looks_at_scales_a_large_datum_of_any_dtype(dtype: torch.dtype, scale: float):
    x = spread(dtype, scale)
    for p in (1.5, 2):
        factor, _ = _scaling.normalization(p, 0.0)
        y = x.clone()
        assert _scaling._scale_large_datum_(y, p, factor)
        torch.testing.assert_close(y, normalize(x, p, param_ndim=None), rtol=4 * torch.finfo(dtype).eps, atol=0)
    for epsilon in (1e-3, 1.0):
        transform = l2_projection(epsilon)
        y = x.clone()
        assert _scaling._scale_large_datum_(y, 2, transform.factor)  # pyright: ignore[reportAttributeAccessIssue]
        expected = project_l2_ball(x, epsilon, param_ndim=None)
        torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-45)
        again = y.clone()
        assert _scaling._scale_large_datum_(again, 2, transform.factor)  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(again, y)
