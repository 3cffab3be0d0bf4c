"""What the optimizers use of torch's private API is there, and does what they expect of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam

from rai_toolbox.optim import _torch_private as private


def sgd(**options: Any) -> tuple[torch.Tensor, SGD]:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    return x, SGD([x], lr=0.5, **options)


def test_foreach_operators_change_lists_in_place() -> None:
    xs = [torch.tensor([-2.0, 3.0]), torch.tensor([4.0])]
    private.foreach_add_(xs, [torch.ones(2), torch.ones(1)], alpha=-1.0)
    private.foreach_mul_(xs, 2.0)
    private.foreach_clamp_min_(xs, -4.0)
    private.foreach_clamp_max_(xs, 5.0)
    assert [x.tolist() for x in xs] == [[-4.0, 4.0], [5.0]]
    private.foreach_sign_(xs)
    assert [x.tolist() for x in xs] == [[-1.0, 1.0], [1.0]]
    private.foreach_copy_(xs, [torch.tensor([7.0, 8.0]), torch.tensor([9.0])])
    assert [x.tolist() for x in xs] == [[7.0, 8.0], [9.0]]
    private.foreach_zero_(xs)
    assert [x.tolist() for x in xs] == [[0.0, 0.0], [0.0]]


def test_not_traced_runs_a_function_as_it_is() -> None:
    assert private.not_traced(lambda x: x + 1)(1) == 2


def test_hook_tables_are_those_of_an_optimizer() -> None:
    _, optim = sgd()
    assert {name for name in vars(optim) if name.endswith("_hooks")} == set(private.HOOK_TABLES)
    bare = SGD.__new__(SGD)
    private.prepare_optimizer(bare)
    assert set(private.HOOK_TABLES) <= vars(bare).keys()


def test_bare_step_is_torchs_own_without_decorators() -> None:
    x, optim = sgd()
    step: Any = private.bare_step(optim)
    with torch.no_grad():
        step(optim)
    assert x.tolist() == [0.5, 0.5]
    assert private.bare_step(Adam([x])) is not None
    assert private.bare_step(LBFGS([x])) is None
    assert private.bare_step(type("Own", (SGD,), {})([x])) is None


def test_a_scheduler_does_not_count_as_an_observer_and_is_told_of_steps() -> None:
    _, optim = sgd()
    assert private.is_unobserved(optim)
    torch.optim.lr_scheduler.ExponentialLR(optim, 0.9)
    assert "step" in vars(optim)
    assert private.is_unobserved(optim)
    private.note_step(optim)
    assert getattr(optim, private.SCHEDULERS_MARK)
    handle = optim.register_step_pre_hook(lambda *_: None)
    assert private.has_step_hooks(optim)
    assert not private.is_unobserved(optim)
    handle.remove()
    optim.step = lambda closure=None: None  # type: ignore[method-assign]
    assert not private.is_unobserved(optim)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiler_errors_are_what_a_full_graph_and_a_limit_raise() -> None:
    errors = private.compiler_errors()
    with pytest.raises(errors):
        private.compiled(lambda x: torch._dynamo.graph_break(), {"backend": "eager"})(torch.ones(2))
    torch._dynamo.reset()


def test_strided_shard_is_a_kind_of_placement() -> None:
    assert private.strided_shard()(0, split_factor=2).split_factor == 2


def test_flattened_parameters_and_sparse_values() -> None:
    x = torch.ones(2)
    assert not private.is_flattened(x)
    x._fsdp_flattened = True  # type: ignore[attr-defined]
    assert private.is_flattened(x)
    sparse = torch.tensor([[0.0, 3.0]]).to_sparse_coo()
    private.sparse_values(sparse).mul_(2)
    assert sparse.to_dense().tolist() == [[0.0, 6.0]]
