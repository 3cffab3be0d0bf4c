"""Sparse gradients: right where the mathematics allows, else an error that says what to do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.optim import SGD, SparseAdam

from rai_toolbox import optim as rai
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    L1NormedGradientOptim,
    L2NormedGradientOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

DENSE = torch.tensor([[0.0, 0.0, 0.0], [3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [-6.0, 8.0, 0.0]])


def sparse(sparse_dim: int, coalesced: bool) -> torch.Tensor:
    g = DENSE.to_sparse(sparse_dim)
    if not coalesced:  # every value in two halves
        g = torch.sparse_coo_tensor(
            torch.cat([g.indices()] * 2, 1), torch.cat([g.values() / 2] * 2), g.shape, check_invariants=True
        )
    return g


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize(
    ("build", "param_ndim", "sparse_dim"),
    [
        (functools.partial(ParamTransformingOptimizer, grad_scale=3.0), -1, 1),
        (functools.partial(ParamTransformingOptimizer, grad_scale=3.0), -1, 2),
        (SignedGradientOptim, None, 1),
        (SignedGradientOptim, None, 2),
        (functools.partial(ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=2.0), None, 1),
        (functools.partial(ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=2.0), None, 2),
        (functools.partial(L2NormedGradientOptim, grad_scale=2.0), None, 1),
        (functools.partial(L2NormedGradientOptim, grad_scale=2.0), None, 2),
        (L1NormedGradientOptim, None, 2),
        (L2NormedGradientOptim, -1, 1),
        (functools.partial(TopQGradientOptimizer, q=0.5), -1, 1),
    ],
)
def test_a_sparse_gradient_gives_what_the_dense_one_gives(
    build: Any, param_ndim: int | None, sparse_dim: int, coalesced: bool
) -> None:
    results = []
    for g in (sparse(sparse_dim, coalesced), DENSE.clone()):
        x = torch.ones(4, 3, requires_grad=True)
        x.grad = g
        build([x], SGD, lr=0.5, param_ndim=param_ndim).step()
        assert x.grad is g
        results += [x.detach(), g.to_dense()]
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[1], results[3], rtol=1e-6, atol=0)


def test_an_embedding_trains_on_sparse_gradients() -> None:
    table = torch.nn.Embedding(10, 4, sparse=True)
    optim = L2NormedGradientOptim(table.parameters(), SparseAdam, lr=0.1)
    before = table.weight.detach().clone()
    for _ in range(3):
        optim.zero_grad()
        table(torch.tensor([1, 1, 7])).square().sum().backward()
        optim.step()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense()[[1, 7]].norm(dim=1), torch.ones(2))
    assert (before != table.weight).any(1).nonzero().flatten().tolist() == [1, 7]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (functools.partial(ParamTransformingOptimizer, grad_bias=1.0), "grad_bias"),
        (functools.partial(ClampedGradientOptimizer, clamp_min=1.0), "bounds must include 0"),
        (functools.partial(L2NormedGradientOptim, param_ndim=-1), "param_ndim"),
        (functools.partial(TopQGradientOptimizer, q=0.5, param_ndim=None), "param_ndim"),
    ],
)
def test_what_would_make_a_sparse_gradient_dense_is_a_type_error_that_says_what_to_do(build: Any, message: str) -> None:
    x = torch.ones(4, 3, requires_grad=True)
    x.grad = sparse(2, True)
    with pytest.raises(TypeError, match=message):
        build([x], lr=0.5).step()


def test_a_users_hook_sees_a_sparse_gradient_where_it_needs_no_other_shape() -> None:
    class Doubles(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: torch.Tensor, optim_group: Any) -> None:
            assert param.grad is not None
            param.grad.mul_(2.0)

    x = torch.ones(4, 3, requires_grad=True)
    x.grad = sparse(1, True)
    Doubles([x], lr=0.5).step()
    assert torch.equal(x.grad.to_dense(), 2 * DENSE)
    with pytest.raises(TypeError, match="sparse gradient cannot be viewed"):
        Doubles([x], lr=0.5, param_ndim=None).step()


def test_a_chain_takes_sparse_gradients() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    x.grad = sparse(1, False)
    ChainedParamTransformingOptimizer(
        functools.partial(ClampedGradientOptimizer, clamp_max=1.0), SignedGradientOptim, params=[x], lr=1.0
    ).step()
    assert torch.equal(x.grad.to_dense(), DENSE.sign())


def test_projections_of_parameters_with_sparse_gradients_work() -> None:
    x = torch.full((4, 3), 5.0, requires_grad=True)
    x.grad = sparse(1, True)
    rai.L2ProjectedOptim([x], lr=0.5, epsilon=1.0).step()
    torch.testing.assert_close(x.detach().norm(dim=1), torch.ones(4))
