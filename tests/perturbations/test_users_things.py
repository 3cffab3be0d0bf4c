"""Models that change their input, data with gaps or nothing in them, and default devices: the user's things stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rai_toolbox.perturbations import gradient_ascent, minimum_norm, universal, worst_case


class Subtracts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.25)


class SubtractsSilently(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.sub_(0.25)
        return x


class SubtractsFromData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.sub_(0.25)
        return x


class SubtractsACopy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.25


def network(first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(first, nn.ReLU(inplace=not isinstance(first, SubtractsACopy)), nn.Linear(4, 3)).double()


def by_worst_case(model: Callable, x: Tensor, y: Tensor) -> list[Tensor]:
    found = worst_case(model, x, y, norm="linf", epsilon=0.3, steps=5, restarts=4)
    return [found.perturbed, found.losses, found.distances]


def by_minimum_norm(model: Callable, x: Tensor, y: Tensor) -> list[Tensor]:
    found = minimum_norm(model, x, y, norm="l2", steps=5, restarts=2)
    return [found.perturbed, found.losses, found.distances]


def by_universal(model: Callable, x: Tensor, y: Tensor) -> list[Tensor]:
    found = universal(model, [(x[:3], y[:3]), (x[3:], y[3:])], norm="l2", epsilon=0.4, epochs=2)
    return [found.delta, torch.tensor([found.loss, found.success_rate], device="cpu")]


def by_gradient_ascent(model: Callable, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(
        gradient_ascent(
            model=model, data=x, target=y, optimizer=torch.optim.SGD, lr=0.5, steps=3, use_best=True, samples=2,
            perturbation_model=Identical,
        )
    )  # fmt: skip


class Identical(nn.Module):
    """A perturbation model that gives the data themselves while there is nothing to add."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(data))

    def forward(self, data: Tensor) -> Tensor:
        return data + self.delta if torch.is_grad_enabled() or bool(self.delta.any()) else data


SOLVERS = [by_worst_case, by_minimum_norm, by_universal, by_gradient_ascent]


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.rand(6, 4, generator=generator, dtype=torch.float64, device="cpu")
    return x, torch.tensor([0, 1, 2, 0, 1, 2], device="cpu")


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("first", [Subtracts, SubtractsSilently, SubtractsFromData])
def test_a_model_in_place_on_its_input_gives_what_one_out_of_place_does(solve: Callable, first: type[nn.Module]):
    x, y = problem()
    before, targets = x.clone(), y.clone()
    expected = solve(network(SubtractsACopy()), x.clone(), y)
    result = solve(network(first()), x, y)
    assert torch.equal(x, before)
    assert torch.equal(y, targets)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_default_device_does_not_move_tensors(solve: Callable):
    x, y = problem()
    expected = solve(network(SubtractsACopy()), x, y)
    model = network(SubtractsACopy())
    with torch.device("meta"):
        result = solve(model, x, y)
    for a, b in zip(result, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("gap", [torch.nan, torch.inf, -torch.inf])
def test_a_datum_that_is_not_finite_has_no_success_and_leaves_the_others_theirs(norm: str, gap: float):
    x, y = problem()
    model = network(SubtractsACopy())
    alone = minimum_norm(model, x[1:], y[1:], norm=norm, steps=5, restarts=2)
    x[0, 2] = gap
    before = x.clone()
    found = minimum_norm(model, x, y, norm=norm, steps=5, restarts=2)
    if gap != gap:
        assert not bool(found.success[0])
        assert found.distances[0] == torch.inf
    assert found.distances[0] in (0, torch.inf)
    assert torch.equal(found.distances[1:], alone.distances)
    assert torch.equal(found.perturbed[0].isnan(), before[0].isnan())
    attacked = worst_case(model, x, y, norm=norm, epsilon=1.0, steps=5, restarts=2)
    assert gap == gap or not bool(attacked.success[0])


def test_universal_passes_over_empty_batches():
    x, y = problem()
    model = network(SubtractsACopy())
    plain = universal(model, [(x, y)], norm="l2", epsilon=0.4, epochs=2)
    found = universal(model, [(x[:0], y[:0]), (x, y), (x[:0], y[:0])], norm="l2", epsilon=0.4, epochs=2)
    assert torch.equal(found.delta, plain.delta)
    assert (found.loss, found.success_rate) == (plain.loss, plain.success_rate)
    with pytest.raises(ValueError, match="loader is empty"):
        universal(model, [(x[:0], y[:0])], norm="l2", epsilon=0.4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_data_without_features_come_back_as_they_are(norm: str):
    x, y = torch.zeros(3, 0), torch.tensor([0, 1, 0])

    def model(x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2) + x.sum(dim=1, keepdim=True)

    for found in (
        worst_case(model, x, y, norm=norm, epsilon=1.0, restarts=3),
        minimum_norm(model, x, y, norm=norm, restarts=3),
    ):
        assert found.perturbed.shape == (3, 0)
        assert found.success.tolist() == [False, True, False]
    assert worst_case(model, x, y, norm=norm, epsilon=1.0).distances.tolist() == [0.0, 0.0, 0.0]
    assert minimum_norm(model, x, y, norm=norm).distances.tolist() == [torch.inf, 0.0, torch.inf]
    everywhere = universal(model, [(x, y)], norm=norm, epsilon=1.0)
    assert everywhere.delta.shape == (0,)
    assert everywhere.success_rate == pytest.approx(1 / 3)
    perturbed, losses = gradient_ascent(model=model, data=x, target=y, optimizer=torch.optim.SGD, lr=0.1, steps=2)
    assert perturbed.shape == (3, 0)
    assert losses.shape == (3,)
