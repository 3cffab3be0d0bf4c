"""Perturbation models, random numbers that belong to a sample, and one perturbation for all."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim
from rai_toolbox.perturbations import (
    AdditivePerturbation,
    PerturbationModel,
    gradient_ascent,
    random_restart,
    universal,
)
from rai_toolbox.perturbations._noise import Noise


@pytest.mark.parametrize(
    ("delta_ndim", "shape"),
    [(None, (4, 3, 2)), (0, ()), (1, (2,)), (3, (4, 3, 2)), (-1, (3, 2)), (-3, ())],
)
def test_delta_keeps_trailing_or_drops_leading_dimensions(delta_ndim, shape):
    data = torch.ones(4, 3, 2, dtype=torch.float64)
    for given in (data, data.shape):
        model = AdditivePerturbation(given, delta_ndim=delta_ndim)
        assert model.delta.shape == shape
        assert isinstance(model, PerturbationModel)
    assert AdditivePerturbation(data).delta.dtype == torch.float64
    assert torch.equal(AdditivePerturbation(data)(data), data)


def test_bad_arguments_of_additive_perturbation_are_named():
    data = torch.ones(2, 3)
    with pytest.raises(TypeError, match="val"):
        AdditivePerturbation(data, val=1)
    with pytest.raises(ValueError, match="delta_ndim"):
        AdditivePerturbation(data, delta_ndim=3)
    with pytest.raises(TypeError, match="floating"):
        AdditivePerturbation(torch.ones(2, dtype=torch.long))


def test_the_documented_parameters_have_their_names_kinds_and_defaults():
    parameters = inspect.signature(gradient_ascent).parameters
    required = ["model", "data", "target", "optimizer", "steps"]
    assert list(parameters)[:5] == required
    assert all(parameters[name].default is inspect.Parameter.empty for name in required)
    defaults = {
        "perturbation_model": AdditivePerturbation, "targeted": False, "use_best": False, "criterion": None,
        "reduction_fn": torch.sum,
    }  # fmt: skip
    for name, default in defaults.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is default
    assert list(inspect.signature(random_restart).parameters) == ["solver", "repeats"]


def test_a_universal_delta_with_bounds_suits_every_datum():
    data = torch.tensor([[0.0, 0.5], [0.9, 0.2]])
    perturbed, _ = gradient_ascent(
        model=lambda x: x, data=data, target=data, criterion=lambda output, _: output.sum(1), lr=1.0, steps=3,
        optimizer=torch.optim.SGD, bounds=(0, 1), perturbation_model=lambda x: AdditivePerturbation(x, delta_ndim=-1),
    )  # fmt: skip
    torch.testing.assert_close(perturbed - data, torch.tensor([0.1, 0.5]).expand(2, 2))


def test_noise_belongs_to_the_sample_and_looks_random():
    data = torch.rand(50, 400, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(50)
    noise = Noise(data, 1)
    uniform, normal = noise.uniform(rows, 3), noise.normal(rows, 3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Noise(data[order], 1).uniform(rows, 3), uniform[order])
    for other in (noise.uniform(rows, 4), Noise(data, 2).uniform(rows, 3)):
        assert abs(torch.corrcoef(torch.stack([other.flatten(), uniform.flatten()]))[0, 1]) < 0.03
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.02
    assert torch.corrcoef(normal)[0, 1:].abs().max() < 0.25


@pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l0"])
def test_universal_beats_random_directions_and_stays_in_its_ball(digits, norm):
    model, x, y = digits
    epsilon = {"l2": 1.5, "linf": 0.25, "l1": 6.0, "l0": 5}[norm]
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
    state = torch.get_rng_state()
    found = universal(model, loader, norm=norm, epsilon=epsilon, bounds=(0, 1), epochs=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.distance <= epsilon * (1 + 1e-12)
    rate = (model((x + found.delta).clamp(0, 1)).argmax(1) != y).double().mean().item()
    assert found.success_rate == pytest.approx(rate)
    assert found.success_rate > 0.25
    if norm in ("l2", "linf"):  # no weaker than a loop with a step size found by trial
        perturbation = AdditivePerturbation(x, delta_ndim=-1)
        optimizer = {"l2": L2ProjectedOptim, "linf": LinfProjectedOptim}[norm](
            perturbation.parameters(), epsilon=epsilon, lr=epsilon / 5, param_ndim=None
        )
        for _ in range(8):
            for data, target in DataLoader(TensorDataset(x, y), batch_size=20):
                optimizer.zero_grad()
                (-cross_entropy(model(perturbation(data)), target)).backward()
                optimizer.step()
        by_hand = (model((x + perturbation.delta).clamp(0, 1)).argmax(1) != y).double().mean().item()
        assert found.success_rate >= by_hand
    with pytest.raises(ValueError, match="empty"):
        universal(model, [], norm=norm, epsilon=1.0)
    with pytest.raises(TypeError, match="more than once"):
        universal(model, iter(loader), norm=norm, epsilon=1.0)
