"""Transforms that remember: the averages themselves, and that nothing around an optimizer loses or spoils them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from same_steps import gradient, parameter, step
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    JointOptimizer,
    L2ProjectedOptim,
    OrthogonalizedGradientOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

KEY = "AveragedGradientOptim.mean"
INNERS = [partial(SGD, lr=0.1), partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.1), partial(RMSprop, lr=0.1)]


def built(p: Any, inner: Any = INNERS[0], **options: Any) -> AveragedGradientOptim:
    return AveragedGradientOptim([p] if isinstance(p, Tensor) else p, inner, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("decay", "mix", "weight"), [(0.9, 1.0, None), (0.95, 0.95, None), (0.99, 0.9 / 0.99, None), (1.0, 1.0, 1.0)]
)
def test_the_average_is_that_of_the_formula(dtype: torch.dtype, decay: float, mix: float, weight: Any) -> None:
    p = parameter(3, 5, dtype=dtype)
    optim = built(p, decay=decay, mix=mix, weight=weight)
    mean = torch.zeros(3, 5, dtype=torch.float64)
    share = 1 - decay if weight is None else weight
    for t in range(20):
        g = gradient(p.shape, 10 * t, dtype)
        step(optim, t)
        mean = decay * mean + share * g.double()
        expected = mix * mean + (1 - mix) * g.double()
        eps = torch.finfo(dtype).eps if dtype.itemsize < 4 else 20 * torch.finfo(dtype).eps
        assert p.grad is not None
        assert (p.grad.double() - expected).abs().max() <= eps * (expected.abs().max() + g.double().abs().max())
    assert optim.state[p][KEY].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("inner", INNERS, ids=["SGD", "momentum", "Adam", "RMSprop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_checkpoint_carries_it_in_its_dtype(inner: Any, dtype: torch.dtype, steps: int) -> None:
    p = parameter(3, 4, dtype=dtype)
    optim = built(p, inner)
    step(optim, *range(steps))
    file = io.BytesIO()
    torch.save(optim.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    q = p.detach().clone().requires_grad_()
    loaded = built(q, inner)
    loaded.load_state_dict(saved)
    if steps:
        assert loaded.state[q][KEY].dtype == torch.float32
    step(optim, 7, 8)
    step(loaded, 7, 8)
    assert torch.equal(p, q)
    if steps:
        assert torch.equal(saved["state"][0][KEY], kept["state"][0][KEY])  # it was copied
    assert optim.state_dict().keys() == optim.inner_opt.state_dict().keys()


@pytest.mark.parametrize("inner", INNERS, ids=["SGD", "momentum", "Adam", "RMSprop"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_distributed_checkpoint_carries_it(inner: Any, flatten: bool, steps: int) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = nn.Linear(4, 3)
    optim = built(net.parameters(), inner)
    step(optim, *range(steps))
    before = copy.deepcopy(net)
    saved = get_optimizer_state_dict(net, optim, options=options)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    other = copy.deepcopy(net)
    loaded = built(other.parameters(), inner)
    set_optimizer_state_dict(other, loaded, copy.deepcopy(saved), options=options)
    step(optim, 7, 8)
    step(loaded, 7, 8)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_remember_by_themselves(copied: Any, steps: int) -> None:
    p = parameter(3, 4)
    optim = built(p, INNERS[2])
    step(optim, *range(steps))
    q, other = copied((p, optim))
    step(optim, 5)
    step(other, 5)
    assert torch.equal(p, q)
    step(optim, 6)
    assert not torch.equal(p, q)


def test_links_of_one_class_remember_apart() -> None:
    p, q = parameter(3, 4), parameter(3, 4)
    chain = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.5), partial(AveragedGradientOptim, decay=0.9), params=[p], lr=0.1
    )
    nested = AveragedGradientOptim([q], partial(AveragedGradientOptim, InnerOpt=SGD, decay=0.9, lr=0.1), decay=0.5)
    for t in range(3):
        step(chain, t)
        step(nested, t)
    assert set(chain.state[p]) >= {KEY, "AveragedGradientOptim#2.mean"}
    assert torch.equal(p, q)
    other = copy.deepcopy(chain)
    step(chain, 3)
    step(other, 3)
    assert torch.equal(p, other.param_groups[0]["params"][0])


def test_a_scaler_that_skips_a_step_leaves_it() -> None:
    p = parameter(3, 4)
    optim = built(p, INNERS[2])
    step(optim, 0)
    mean = optim.state[p][KEY].clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # pyright: ignore[reportPrivateImportUsage]
    scaler.scale(torch.ones(()))
    p.grad = torch.full_like(p, float("inf"))
    scaler.step(optim)
    scaler.update()
    assert torch.equal(optim.state[p][KEY], mean)


def test_a_parameter_without_gradient_forgets_nothing() -> None:
    p, q = parameter(3), parameter(3)
    optim = built([p, q], INNERS[2])
    step(optim, 0)
    mean = optim.state[q][KEY].clone()
    p.grad, q.grad = gradient(3, 1), None
    optim.step()
    assert torch.equal(optim.state[q][KEY], mean)
    assert not torch.equal(optim.state[p][KEY], mean)


def test_a_closure_is_evaluated_once_or_refused() -> None:
    p = parameter(3)

    def closure() -> Tensor:
        loss = (p**2).sum()
        p.grad = 2 * p.detach()
        return loss

    optim = built(p)
    assert optim.step(closure).item() > 0
    for refused in (
        built(p, LBFGS),
        Heavy([p], LBFGS),
        ChainedParamTransformingOptimizer(SignedGradientOptim, Heavy, params=[p], InnerOpt=LBFGS),
    ):
        with pytest.raises(RuntimeError, match="evaluated the closure twice"):
            refused.step(closure)


def test_a_step_that_the_inner_optimizer_skips_is_not_remembered() -> None:
    class Impatient(SGD):
        def step(self, closure: Any = None) -> Any:
            return None  # without a look at the closure

    def closure() -> Tensor:
        p.grad = torch.ones_like(p)
        return p.sum()

    p = parameter(3)
    optim = built(p, partial(Impatient, lr=0.1))
    for _ in range(2):
        optim.step(closure)
    assert optim.memory(p, "mean").count_nonzero() == 0


def test_nothing_is_stepped_at_construction_and_probes_move_nothing() -> None:
    p = parameter(3)
    optim = built(p, partial(Adam, lr=0.0))
    assert not optim.state
    p.grad = torch.zeros(3)
    optim.step()
    assert optim.state[p][KEY].count_nonzero() == 0


def test_compiled_steps_remember() -> None:
    p, q = parameter(3, 4), parameter(3, 4)
    optim, compiled = built(p), built(q)
    compiled.compile(backend="eager")
    for t in range(4):
        step(optim, t)
        step(compiled, t)
    assert torch.equal(p, q)


def test_large_parameters_remember_without_a_copy_of_their_size() -> None:
    p = parameter(2**12, 2**9, dtype=torch.float32)
    optim = built(p, decay=0.5, mix=0.5)
    step(optim, 0)
    assert p.grad is not None
    assert torch.allclose(p.grad, 0.75 * gradient(p.shape, 0))


class Heavy(ParamTransformingOptimizer):
    """A user's own momentum."""

    def _pre_step_transform_(self, param: Tensor, optim_group: Any) -> None:
        mean = self.memory(param, "mean")
        assert param.grad is not None
        assert mean.shape == param.shape
        mean.mul_(0.9).add_(param.grad, alpha=0.1)
        param.grad.copy_(mean)


@pytest.mark.parametrize("inner", INNERS, ids=["SGD", "momentum", "Adam", "RMSprop"])
@pytest.mark.parametrize("param_ndim", [-1, None, 0])
def test_a_users_hook_remembers_too(inner: Any, param_ndim: Any) -> None:
    p, q = parameter(3, 4), parameter(3, 4)
    optim, declared = Heavy([p], inner, param_ndim=param_ndim), built(q, inner)
    for t in range(3):
        step(optim, t)
        step(declared, t)
    assert torch.allclose(p, q, atol=1e-6)
    assert optim.state[p]["Heavy.mean"].shape == p.shape
    assert torch.equal(optim.memory(p, "mean"), optim.state[p]["Heavy.mean"])
    loaded = copy.deepcopy(optim)
    loaded.load_state_dict(optim.state_dict())
    chain = ChainedParamTransformingOptimizer(Heavy, Heavy, params=[q], lr=0.1)
    step(chain, 0)
    assert set(chain.state[q]) >= {"Heavy.mean", "Heavy#2.mean"}
    with pytest.raises(KeyError, match="no parameter"):
        optim.memory(torch.zeros(3), "mean")


def test_it_may_be_a_member_beside_others() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    muon = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.95, mix=0.95),
        OrthogonalizedGradientOptim,
        params=[layer.weight for layer in net],  # pyright: ignore
        lr=0.02,
        param_ndim=2,
    )
    optim = JointOptimizer(muon, AdamW([layer.bias for layer in net], lr=0.01))  # pyright: ignore
    step(optim, 0, 1)
    other = copy.deepcopy(optim)
    other.load_state_dict(copy.deepcopy(optim.state_dict()))  # torch's own members share what they load
    step(optim, 2)
    step(other, 2)
    for a, b in zip(optim.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)


def test_what_cannot_be_averaged_is_refused() -> None:
    p = parameter(4, 3)
    optim = built(p)
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 3), (4, 3), check_invariants=True)
    with pytest.raises(TypeError, match="sparse"):
        optim.step()
    with pytest.raises(ValueError, match="decay"):
        built(p, decay=1.5)
    with pytest.raises(TypeError, match="weight"):
        built(p, weight="all")


def test_projections_after_the_step_see_it() -> None:
    p = parameter(3, 4)
    optim = AveragedGradientOptim([p], functools.partial(L2ProjectedOptim, InnerOpt=Adam, lr=0.1, epsilon=0.5))
    step(optim, 0, 1, 2)
    assert p.norm(dim=1).max() <= 0.5 + 1e-6
