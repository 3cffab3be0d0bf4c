"""One optimizer out of several."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from rai_toolbox.optim import ChainedParamTransformingOptimizer, JointOptimizer, L2ProjectedOptim, SignedGradientOptim


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def members(net: nn.Module) -> tuple[Optimizer, Optimizer]:
    weights = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    projected = L2ProjectedOptim([{"params": weights[:1]}, {"params": weights[1:], "epsilon": 2.0}], Adam, epsilon=1.0)
    return projected, AdamW(biases, lr=0.01)


def step(net: nn.Module, *optimizers: Optimizer, seed: int = 0) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    net(x).square().sum().backward()
    for optim in optimizers:
        optim.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_steps_as_its_members_do() -> None:
    apart, joint = model(), model()
    optimizers = members(apart)
    optim = JointOptimizer(*members(joint))
    for seed in range(3):
        step(apart, *optimizers, seed=seed)
        step(joint, optim, seed=seed)
    assert same(apart, joint)


def test_groups_are_the_members_own() -> None:
    optim = JointOptimizer(*members(model()))
    first, second = optim.optimizers
    assert [id(g) for g in optim.param_groups] == [id(g) for g in [*first.param_groups, *second.param_groups]]
    assert set(optim.defaults) == set(first.defaults) & set(second.defaults)
    assert "JointOptimizer" in repr(optim)
    assert "L2ProjectedOptim [Adam]" in repr(optim)


@pytest.mark.parametrize("scheduler", [lambda o: CosineAnnealingLR(o, 5), lambda o: OneCycleLR(o, 0.1, total_steps=10)])
def test_one_scheduler_sets_every_group(scheduler: Any) -> None:
    apart, joint = model(), model()
    optimizers = members(apart)
    optim = JointOptimizer(*members(joint))
    schedulers = [scheduler(o) for o in optimizers]
    together = scheduler(optim)
    for seed in range(4):
        step(apart, *optimizers, seed=seed)
        step(joint, optim, seed=seed)
        for s in (*schedulers, together):
            s.step()
    assert same(apart, joint)
    assert len(together.get_last_lr()) == 3


def test_a_scaler_skips_the_step_of_all_members() -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # pyright: ignore[reportPrivateImportUsage]
    before = copy.deepcopy(net)
    scaler.scale((1e38 * net(torch.ones(1, 4))).square().sum()).backward()
    scaler.step(optim)
    scaler.update()
    assert same(net, before)
    assert not optim.state
    apart = copy.deepcopy(net)
    optimizers = members(apart)
    step(apart, *optimizers)
    net.zero_grad()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    scaler.scale(net(x).square().sum()).backward()
    scaler.step(optim)
    assert all(torch.allclose(a, b) for a, b in zip(net.parameters(), apart.parameters(), strict=True))


def test_a_run_that_is_saved_and_loaded_goes_on_exactly() -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    step(net, optim)
    file = io.BytesIO()
    torch.save(optim.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(net)
    loaded = JointOptimizer(*members(other))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    step(net, optim, seed=1)
    step(other, loaded, seed=1)
    assert same(net, other)
    ids = [i for group in optim.state_dict()["param_groups"] for i in group["params"]]
    assert ids == list(range(4))
    with pytest.raises(ValueError, match="same members in the same order"):
        JointOptimizer(*members(model())[::-1]).load_state_dict(optim.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_hold_all_members(steps: int, flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = model()
    optim = JointOptimizer(*members(net))
    for seed in range(steps):
        step(net, optim, seed=seed)
    before = copy.deepcopy(net)
    saved = get_optimizer_state_dict(net, optim, options=options)
    assert same(net, before)
    other = copy.deepcopy(net)
    loaded = JointOptimizer(*members(other))
    set_optimizer_state_dict(other, loaded, copy.deepcopy(saved), options=options)
    step(net, optim, seed=9)
    step(other, loaded, seed=9)
    assert same(net, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_by_themselves(copied: Any) -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    step(net, optim)
    other, optim_of_other = copied((net, optim))
    step(net, optim, seed=1)
    assert not same(net, other)
    step(other, optim_of_other, seed=1)
    assert same(net, other)


def test_a_closure_is_called_once_before_the_members_step() -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optim.zero_grad()
        loss = net(torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    assert isinstance(optim.step(closure), torch.Tensor)
    assert len(calls) == 1


def test_hooks_fire_once() -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    fired = []
    optim.register_step_pre_hook(lambda *_: fired.append("before"))
    optim.register_step_post_hook(lambda *_: fired.append("after"))
    optim.register_state_dict_post_hook(lambda *_: fired.append("saved"))
    step(net, optim)
    optim.state_dict()
    assert fired == ["before", "after", "saved"]


def test_state_is_a_view() -> None:
    net = model()
    optim = JointOptimizer(*members(net))
    step(net, optim)
    for member in optim.optimizers:
        for p, entry in member.state.items():
            assert optim.state[p] is entry
    assert len(optim.state) == 4
    entries = dict(optim.state)
    optim.state = {}
    assert not optim.optimizers[0].state
    optim.state = entries
    assert set(optim.optimizers[1].state) == {p for p in net.parameters() if p.ndim == 1}
    with pytest.raises(KeyError):
        optim.state[torch.zeros(2)]


def test_what_cannot_be_joined_is_refused() -> None:
    net = model()
    weight = net[0].weight
    with pytest.raises(TypeError, match="got none"):
        JointOptimizer()
    with pytest.raises(TypeError, match="that are built"):
        JointOptimizer(SGD)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shape \(5, 4\) belongs to the members 0 \(SGD\) and 1 \(Adam\)"):
        JointOptimizer(SGD([weight], lr=0.1), Adam([weight]))
    with pytest.raises(TypeError, match="LBFGS"):
        JointOptimizer(SignedGradientOptim([weight], LBFGS))
    optim = JointOptimizer(SGD([weight], lr=0.1))
    with pytest.raises(TypeError, match="one of the members"):
        optim.add_param_group({"params": [net[0].bias]})


def test_joints_and_chains_may_be_members() -> None:
    net = model()
    weight, bias = net[0].weight, net[0].bias
    chain = ChainedParamTransformingOptimizer(SignedGradientOptim, params=[weight], lr=0.1)
    optim = JointOptimizer(JointOptimizer(chain), SGD([bias], lr=0.1))
    before = weight.detach().clone()
    step(net, optim)
    assert (weight - before).abs().max().item() == pytest.approx(0.1)
    loaded = optim.state_dict()
    optim.load_state_dict(loaded)
