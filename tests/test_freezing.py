"""`evaluating`, `freeze`, `frozen` and `negate`: only what was seen at entry comes back, whatever happens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from rai_toolbox import evaluating, freeze, frozen, negate


def test_evaluating_restores_each_flag_also_after_an_exception_and_as_a_decorator():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    net[1][1].eval()
    before = [m.training for m in net.modules()]

    @evaluating(net)
    def inside() -> list[bool]:
        return [m.training for m in net.modules()]

    for _ in range(2):
        assert inside() == [False] * 5
        assert [m.training for m in net.modules()] == before
    with pytest.raises(KeyboardInterrupt), evaluating(net):
        raise KeyboardInterrupt
    assert [m.training for m in net.modules()] == before
    with pytest.raises(TypeError, match="Module"), evaluating(3):  # pyright: ignore[reportArgumentType]
        pass


def test_freeze_takes_tensors_modules_optimizers_groups_and_iterables():
    tensors = [torch.ones(1, requires_grad=True) for _ in range(3)]
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    group = {"params": [torch.ones(1, requires_grad=True)], "lr": 1.0}
    every = [*tensors, *net.parameters(), *optimizer.param_groups[0]["params"], *group["params"]]
    before = [t.requires_grad for t in every]
    restore = freeze(tensors[0], iter(tensors[1:]), net, net, optimizer, group)
    assert not any(t.requires_grad for t in every)
    restore()
    assert [t.requires_grad for t in every] == before
    with pytest.raises(TypeError, match="freeze takes"):
        freeze(3)


def test_a_tensor_that_cannot_be_frozen_leaves_the_others_as_they_were():
    leaf = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="leaf"):
        freeze(leaf, leaf * 2)
    assert leaf.requires_grad


def test_frozen_serves_a_second_call_of_a_decorated_function_and_nests():
    net = nn.Linear(2, 1)

    @frozen(net.parameters())
    def inside() -> bool:
        with frozen(net):
            pass
        return net.weight.requires_grad

    assert [inside(), inside()] == [False, False]
    assert net.weight.requires_grad


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_freeze_returns_keeps_no_tensor_alive_and_restores_the_others(wrapped: bool):
    dropped, kept = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    alive = weakref.ref(dropped)
    restore = freeze([dropped, kept]) if wrapped else freeze(dropped, kept)
    assert alive() is dropped
    del dropped
    assert alive() is None
    restore()
    assert kept.requires_grad


def test_freeze_restores_a_tensor_that_only_a_graph_holds():
    leaf = torch.ones(2, requires_grad=True)
    graph = (leaf * 2).grad_fn
    assert graph is not None
    restore = freeze(leaf)
    del leaf
    assert not graph.next_functions[0][0].variable.requires_grad
    restore()
    assert graph.next_functions[0][0].variable.requires_grad


def test_evaluating_keeps_no_module_alive_before_and_inside_the_block():
    net = nn.Linear(2, 2)
    alive, context = weakref.ref(net), evaluating(net)
    del net
    gc.collect()
    assert alive() is None
    with context:
        pass
    first, second = nn.Dropout(), nn.Sequential(nn.Dropout())
    alive = weakref.ref(first)
    with evaluating(first, second):
        del first
        gc.collect()
        assert alive() is None
        assert not second[0].training
    assert second.training
    assert second[0].training


def test_a_function_under_evaluating_may_call_itself_and_a_failing_eval_changes_no_flag():
    net = nn.Dropout()

    @evaluating(net)
    def depth(n: int) -> list[bool]:
        return [net.training, *(depth(n - 1) if n else [])]

    assert depth(2) == [False] * 3
    assert net.training

    class Stuck(nn.Module):
        def train(self, mode: bool = True):
            raise RuntimeError("stuck")

    stuck = Stuck()
    with pytest.raises(RuntimeError, match="stuck"), evaluating(net, stuck):
        pass
    assert net.training


def test_negate_keeps_the_name_and_refuses_what_cannot_be_called():
    def loss(x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    assert negate(loss)(torch.ones(2)) == -2
    assert negate(loss).__name__ == "loss"
    with pytest.raises(TypeError, match="callable"):
        negate(3)  # pyright: ignore[reportArgumentType]
