"""What a step costs on a GPU, counted: kernel calls, and bytes in units of a step of SGD."""

from __future__ import annotations

import pytest
import torch
from tests.kernels import fake_cost
from tests.kernels.fake_gpu import needs_fake_tensors

from rai_toolbox import optim as ro

pytestmark = needs_fake_tensors


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of its 161 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((planes, channels, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * planes, channels, 1, 1), (4 * planes,), (4 * planes,)]
            channels = 4 * planes
    return [*shapes, (1000, 2048), (1000,)]


IMAGES, CIFAR = [(256, 3, 224, 224)], [(128, 3, 32, 32)]
SMALL = [(32, 32), (32,)] * 200
BALL = {"epsilon": 1.0}
BOX = {**BALL, "lower": -1.0, "upper": 1.0}

# (class, options, shapes, calls at most, bytes in units of SGD's at most)
ROWS = {
    "L2Normed, images": (ro.L2NormedGradientOptim, {}, IMAGES, 3, 1.7),
    "L2Normed whole, images": (ro.L2NormedGradientOptim, {"param_ndim": None}, IMAGES, 3, 2.1),
    "L1Normed, images": (ro.L1NormedGradientOptim, {}, IMAGES, 3, 1.7),
    "L2Projected, images": (ro.L2ProjectedOptim, {"epsilon": 1.0}, IMAGES, 5, 2.4),
    "LinfProjected, images": (ro.LinfProjectedOptim, {"epsilon": 1.0}, IMAGES, 1, 1.34),
    "L1qNormed, images": (ro.L1qNormedGradientOptim, {"q": 0.9}, IMAGES, 8, 4.0),
    "L1Ball, images": (ro.L1BallOptim, {"epsilon": 1.0}, IMAGES, 8, 5.0),
    "L2Ball+box, images": (ro.L2BallOptim, BOX, IMAGES, 8, 5.0),
    "L1Ball+box, images": (ro.L1BallOptim, BOX, IMAGES, 8, 5.0),
    "L2FrankWolfe, images": (ro.L2FrankWolfe, BALL, IMAGES, 2, 1.7),
    "LinfFrankWolfe, images": (ro.LinfFrankWolfe, BALL, IMAGES, 1, 1.34),
    "L1FrankWolfe, images": (ro.L1FrankWolfe, BALL, IMAGES, 2, 2.1),
    "L1qFrankWolfe, images": (ro.L1qFrankWolfe, {**BALL, "q": 0.9}, IMAGES, 2, 2.1),
    "L2FrankWolfe, cifar": (ro.L2FrankWolfe, BALL, CIFAR, 1, 1.34),
    "L2Normed, cifar": (ro.L2NormedGradientOptim, {}, CIFAR, 1, 1.34),
    "L2Projected, cifar": (ro.L2ProjectedOptim, {"epsilon": 1.0}, CIFAR, 4, 1.7),
    "L2Ball+box, cifar": (ro.L2BallOptim, BOX, CIFAR, 8, 5.0),
    "L1Ball+box, cifar": (ro.L1BallOptim, BOX, CIFAR, 8, 5.0),
    "L2Normed, resnet50": (ro.L2NormedGradientOptim, {}, resnet50(), 6, 1.7),
    "L2Projected, resnet50": (ro.L2ProjectedOptim, {"epsilon": 1.0}, resnet50(), 10, 2.4),
    "L2Normed, 400 small": (ro.L2NormedGradientOptim, {}, SMALL, 10, 1.7),
}


@pytest.mark.parametrize("shapes", [[(256, 256)] * 12, [(256, 128)] * 6 + [(128, 256)] * 6], ids=["squares", "others"])
def test_a_newton_schulz_step_is_three_calls_for_all_matrices_of_a_shape(shapes: list[tuple[int, ...]]) -> None:
    def calls(steps: int) -> int:
        return fake_cost.step(lambda ps: ro.OrthogonalizedGradientOptim(ps, lr=0.1, steps=steps), shapes).calls

    assert calls(5) - calls(1) == 4 * 3 * len(set(shapes))


@pytest.mark.parametrize("name", ROWS)
def test_a_step_makes_few_calls_moves_few_bytes_and_allocates_nothing_large(name: str) -> None:
    cls, options, shapes, calls, traffic = ROWS[name]
    sgd = fake_cost.step(lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=True), shapes)
    ours = fake_cost.step(lambda ps: cls(ps, lr=1.0, **options), shapes)
    assert ours.calls <= calls, ours.names
    assert ours.bytes <= traffic * sgd.bytes
    assert ours.temporary <= 0.25
