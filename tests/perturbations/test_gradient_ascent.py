"""`gradient_ascent` and `random_restart`: what they leave behind, and what they return."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    L1NormedGradientOptim,
    L2ProjectedOptim,
    LinfBallOptim,
    LinfProjectedOptim,
    TopQGradientOptimizer,
)
from rai_toolbox.perturbations import (
    AdditivePerturbation,
    MultiplicativePerturbation,
    ShiftPerturbation,
    gradient_ascent,
    random_restart,
)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_equals_a_loop_written_by_hand(net, batch, norm):
    x, y = batch
    net.eval()
    optimizer = {"l2": L2ProjectedOptim, "linf": LinfProjectedOptim}[norm]
    perturbed, losses = gradient_ascent(model=net, data=x, target=y, optimizer=optimizer, lr=0.1, epsilon=0.3, steps=7)
    delta = torch.zeros_like(x)
    for _ in range(7):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(net(x + delta), y, reduction="sum"), delta)
        with torch.no_grad():
            if norm == "linf":
                delta = (delta + 0.1 * grad.sign()).clamp(-0.3, 0.3)
            else:
                delta = delta + 0.1 * grad / grad.norm(dim=1, keepdim=True)
                delta = delta * (0.3 / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(perturbed, x + delta)
    torch.testing.assert_close(losses, cross_entropy(net(perturbed), y, reduction="none"))


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_as_it_was_also_when_the_model_raises(net, batch, failure):
    x, y = batch
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    calls = 0

    def hook(module, args):
        nonlocal calls
        calls += 1
        if failure and calls == 3:
            raise failure

    net.register_forward_pre_hook(hook)
    modes = [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    buffers = [b.clone() for b in net.buffers()]
    state = torch.get_rng_state()
    solve = partial(gradient_ascent, model=net, data=x, target=y, optimizer=SGD, lr=1.0, steps=5)
    if failure:
        with pytest.raises(failure):
            solve()
    else:
        solve()
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert net[0].weight.grad is None
    assert torch.equal(net[4].weight.grad, torch.ones_like(net[4].weight))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_gradient_mode_with_functions_lists_and_arrays(context):
    weight = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    with context():
        perturbed, losses = gradient_ascent(
            model=lambda x: x @ weight, data=[[1.0, 2.0]], target=[1], optimizer=SGD, lr=1.0, steps=3
        )
    assert perturbed.shape == (1, 2)
    assert not perturbed.requires_grad
    assert not losses.requires_grad
    array = torch.tensor([[1.0, 2.0]]).numpy()
    again, _ = gradient_ascent(model=lambda x: x @ weight, data=array, target=[1], optimizer=SGD, lr=1.0, steps=3)
    assert torch.equal(again, perturbed)


def test_hooks_and_profilers_of_the_optimizer_see_every_step(net, batch):
    x, y = batch
    solve = partial(gradient_ascent, model=net, data=x, target=y, steps=3)
    seen: list[str] = []
    pmodel = AdditivePerturbation(x)
    optim = LinfProjectedOptim(pmodel.parameters(), lr=0.1, epsilon=0.3)
    optim.register_step_pre_hook(lambda *_: seen.append("pre"))
    optim.register_step_post_hook(lambda *_: seen.append("post"))
    solve(optimizer=optim, perturbation_model=pmodel)
    assert seen == ["pre", "post"] * 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        solve(optimizer=LinfProjectedOptim, lr=0.1, epsilon=0.3)
    steps = [event for event in profile.key_averages() if event.key.startswith("Optimizer.step#LinfProjectedOptim")]
    assert [event.count for event in steps] == [3]


def test_the_loss_is_maximized_or_if_targeted_minimized_and_never_negated(net, batch):
    x, y = batch
    net.eval()
    before = cross_entropy(net(x), y, reduction="none")
    up = gradient_ascent(model=net, data=x, target=y, optimizer=SGD, lr=0.1, steps=5)[1]
    down = gradient_ascent(model=net, data=x, target=y, optimizer=SGD, lr=0.1, steps=5, targeted=True)[1]
    assert (up > before).all()
    assert (down < before).all()
    assert (down >= 0).all()


def test_use_best_returns_each_datums_best_iterate(net, batch):
    x, y = batch
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    solve = partial(
        gradient_ascent, model=net, data=x, target=y, optimizer=LinfProjectedOptim, lr=0.5, epsilon=0.5, steps=9
    )
    perturbed, losses = solve(use_best=True, callback=lambda step, x, loss: seen.append((x.clone(), loss.clone())))
    last = solve()[1]
    stack = torch.stack([loss for _, loss in seen])
    torch.testing.assert_close(losses, torch.maximum(stack.amax(0), last))
    assert (losses > last).any()
    assert perturbed.shape == x.shape
    with pytest.raises(ValueError, match=r"\(8,\)"):
        solve(use_best=True, criterion=lambda output, target: output.mean())


def test_a_nan_neither_wins_nor_stays_nor_spreads(batch):
    x, _ = batch
    x = x.clone()
    x[2] = 0.95

    def model(x: torch.Tensor) -> torch.Tensor:  # NaN, with NaN gradients, where the first entry is beyond 1
        return torch.where(x[:, :1] > 1, torch.nan * x, x)

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum(dim=1)

    solve = partial(
        gradient_ascent, model=model, data=x, target=x, criterion=criterion, optimizer=SGD, lr=0.02, steps=6
    )
    _, losses = solve(use_best=True)
    assert losses.isfinite().all()
    assert (losses >= x.sum(dim=1)).all()
    last, _ = solve()
    assert last.isfinite().all()
    alone = solve(data=x[:2], target=x[:2])[0]
    assert torch.equal(last[:2], alone)


def test_bounds_hold_to_the_bit_and_do_not_stop_the_ascent():
    torch.manual_seed(0)
    x = torch.rand(16, 5)
    lower, upper = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.7, 1.0, 1.0])
    x = x.clamp(lower, upper)
    weight = torch.randn(5, 3)
    y = (x @ weight).argmax(1)
    solve = partial(
        gradient_ascent, model=lambda x: x @ weight, data=x, target=y, optimizer=LinfProjectedOptim, lr=0.1,
        epsilon=0.3, steps=12,
    )  # fmt: skip
    perturbed, losses = solve(bounds=(lower, upper), use_best=True)
    assert (perturbed >= lower).all()
    assert (perturbed <= upper).all()
    clipped = cross_entropy(solve()[0].clamp(lower, upper) @ weight, y, reduction="none")
    assert losses.mean() > 0.9 * clipped.mean()
    with pytest.raises(ValueError, match="outside the bounds"):
        solve(bounds=(0, 0.5))
    with pytest.raises(TypeError, match="constraint"):
        solve(bounds=(0, 1), perturbation_model=MultiplicativePerturbation)


def test_stop_when_keeps_a_datum_as_it_was_when_it_first_held(net, batch):
    x, y = batch
    net.eval()
    y = net(x).argmax(1)
    steps: list[int] = []
    perturbed, _ = gradient_ascent(
        model=net, data=x, target=y, optimizer=L2ProjectedOptim, lr=0.05, epsilon=9.0, steps=400,
        stop_when=lambda output, target: output.argmax(1) != target, callback=lambda step, *_: steps.append(step),
    )  # fmt: skip
    assert len(steps) < 400
    assert (net(perturbed).argmax(1) != y).all()
    # Just across: one step of 0.05 earlier it was not.
    assert ((perturbed - x).norm(dim=1) < 9.0).all()


class SignOfMomentum(torch.optim.Optimizer):
    """A step along the sign of the accumulated gradient: the recipe of docs/tutorials/pgd.md."""

    def __init__(self, params, lr, decay=1.0):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["decay"]).add_(p.grad)
                p.sub_(momentum.sign(), alpha=group["lr"])


def test_momentum_iterative_fgsm_is_a_chain_around_a_signed_momentum_step(net, batch):
    """Dong et al. 2018: gradients of L1 norm 1 are accumulated, and the sign is taken of the sum."""
    x, y = batch
    net.eval()
    perturbed, _ = gradient_ascent(
        model=net, data=x, target=y, steps=8, bounds=(0, 1), lr=0.05, decay=0.9,
        optimizer=partial(
            ChainedParamTransformingOptimizer, L1NormedGradientOptim, partial(LinfBallOptim, epsilon=0.2),
            InnerOpt=SignOfMomentum,
        ),
    )  # fmt: skip
    expected, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(8):
        expected.requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(net(expected), y, reduction="sum"), expected)
        momentum = 0.9 * momentum + grad / grad.abs().sum(dim=1, keepdim=True)
        expected = (expected.detach() + 0.05 * momentum.sign()).clamp(x - 0.2, x + 0.2).clamp(0, 1)
    torch.testing.assert_close(perturbed, expected)


def test_a_generator_makes_a_solve_repeatable_and_leaves_torchs_own_numbers_alone(batch):
    x, y = batch

    def model(x: torch.Tensor) -> torch.Tensor:
        return x[:, :3] * (1 + torch.rand_like(x[:, :3]))

    def solve(seed: int | None, optimizer) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return gradient_ascent(
            model=model, data=x, target=y, optimizer=optimizer, lr=0.1, steps=3, generator=generator,
            perturbation_model=partial(AdditivePerturbation, init_fn=nn.init.normal_),
        )[0]  # fmt: skip

    for optimizer in (SGD, partial(TopQGradientOptimizer, q=0.5, dq=0.4)):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first, again, other = solve(1, optimizer), solve(1, optimizer), solve(2, optimizer)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(solve(None, optimizer), solve(None, optimizer))
    drawn, chosen = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    at_start = chosen.get_state()
    solve_with = partial(gradient_ascent, model=model, data=x, target=y, lr=0.1, steps=3, generator=drawn)
    solve_with(optimizer=partial(TopQGradientOptimizer, q=0.5, dq=0.4, generator=chosen))
    assert not torch.equal(chosen.get_state(), at_start)  # an optimizer keeps the generator that it was given
    solve_with(optimizer=TopQGradientOptimizer, q=0.5, dq=0.4)


def test_samples_average_the_gradient_of_a_random_model():
    x, y = torch.zeros(400, 1), torch.zeros(400)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 3 * torch.randn_like(x))

    def spread(samples: int) -> float:
        torch.manual_seed(0)
        moved, _ = gradient_ascent(
            model=model, data=x, target=y, criterion=lambda output, target: output[:, 0], optimizer=SGD, lr=1.0,
            steps=1, samples=samples,
        )  # fmt: skip
        assert abs(moved.mean().item() - 1) < 0.6
        return moved.std().item()

    assert spread(25) < 0.3 * spread(1)


def test_other_perturbation_models_obey_the_same_protocol():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 6, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    y = model(images).argmax(1)
    before = cross_entropy(model(images), y, reduction="none")
    for pmodel in (MultiplicativePerturbation, ShiftPerturbation):
        moved, losses = gradient_ascent(
            model=model, data=images, target=y, optimizer=LinfProjectedOptim, lr=0.2, epsilon=1.0, steps=8,
            perturbation_model=pmodel, use_best=True,
        )  # fmt: skip
        assert moved.shape == images.shape
        assert (losses >= before - 1e-6).all()
        assert (losses > before).any()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"optimizer": "sgd"},
        {"optimizer": SGD, "perturbation_model": 3},
        {"optimizer": SGD([torch.zeros(1, requires_grad=True)], lr=1.0)},
        {"optimizer": lambda params: 3},
        {"optimizer": SGD, "perturbation_model": list},
    ],
)
def test_what_is_neither_optimizer_nor_perturbation_model_is_a_type_error(batch, kwargs):
    with pytest.raises(TypeError):
        gradient_ascent(model=nn.Linear(6, 3), data=batch[0], target=batch[1], steps=1, **kwargs)


def test_what_is_no_model_is_told_so(batch):
    with pytest.raises(TypeError, match="model must be callable; got str"):
        gradient_ascent(model="resnet18", data=batch[0], target=batch[1], optimizer=SGD, steps=1, lr=1.0)


def test_an_optimizer_instance_needs_its_perturbation_model_and_no_options(batch):
    x, y = batch
    pmodel = AdditivePerturbation(x)
    optim = SGD(pmodel.parameters(), lr=1.0)
    model = nn.Linear(6, 3)
    with pytest.raises(TypeError, match="lr"):
        gradient_ascent(model=model, data=x, target=y, optimizer=optim, perturbation_model=pmodel, steps=1, lr=2.0)
    perturbed, _ = gradient_ascent(model=model, data=x, target=y, optimizer=optim, perturbation_model=pmodel, steps=3)
    torch.testing.assert_close(perturbed, x + pmodel.delta.detach())
    assert pmodel.delta.grad is None


class TestRandomRestart:
    def test_keeps_the_best_of_each_datum_whichever_way_targeted_is_said(self):
        runs = [(torch.full((3, 1), float(i)), torch.tensor(loss)) for i, loss in enumerate(
            [[1.0, 5.0, torch.nan], [3.0, 2.0, 1.0], [2.0, torch.nan, 0.5]]
        )]  # fmt: skip

        def solver(runs, targeted=False):
            return runs.pop(0)

        assert random_restart(solver, 3)(list(runs))[1].tolist() == [3.0, 5.0, 1.0]
        for restarted, args, kwargs in (
            (random_restart(partial(solver, targeted=True), 3), (), {}),
            (random_restart(solver, 3), (), {"targeted": True}),
            (random_restart(solver, 3), (True,), {}),
        ):
            perturbed, losses = restarted(list(runs), *args, **kwargs)
            assert losses.tolist() == [1.0, 2.0, 0.5]
            assert perturbed.flatten().tolist() == [0.0, 1.0, 2.0]

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (1,), (1, 1)])
    def test_losses_keep_their_shape_and_a_single_one_is_that_of_the_whole_batch(self, shape):
        losses = torch.tensor([[1.0, 5.0, 0.0], [3.0, 2.0, 1.0]])[:, : shape[0]]
        runs = [(torch.full((3, 2), float(i)), loss.reshape(shape)) for i, loss in enumerate(losses)]
        perturbed, best = random_restart(lambda: runs.pop(0), 2)()
        assert best.shape == shape
        assert best.flatten().tolist() == losses.amax(0).tolist()
        rows = [1.0, 0.0, 1.0] if shape[0] == 3 else [1.0] * 3
        assert perturbed.tolist() == [[row] * 2 for row in rows]

    @pytest.mark.parametrize("shape", [(), (2,), (3, 2), (1, 3)])
    def test_losses_that_are_not_one_per_datum_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"shape \(N,\) or \(N, 1\)"):
            random_restart(lambda: (torch.zeros(3, 2), torch.zeros(shape)), 2)()

    def test_every_run_starts_anew(self, batch):
        x, y = batch
        starts: list[torch.Tensor] = []
        pmodel = AdditivePerturbation(x, nn.init.normal_)
        optim = SGD(pmodel.parameters(), lr=0.1, momentum=0.9)
        random_restart(gradient_ascent, 3)(
            model=nn.Linear(6, 3), data=x, target=y, optimizer=optim, perturbation_model=pmodel, steps=2,
            callback=lambda step, x, loss: starts.append(x) if step == 0 else None,
        )  # fmt: skip
        deltas = [start - x for start in starts]
        assert len(deltas) == 3
        assert not torch.allclose(deltas[0], deltas[1])
        assert all(0.5 < delta.std() < 1.5 for delta in deltas)

    def test_refuses_less_than_one_run(self):
        with pytest.raises(ValueError, match="repeats"):
            random_restart(gradient_ascent, 0)
