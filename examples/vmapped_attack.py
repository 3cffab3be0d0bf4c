"""`rai_toolbox.functional` within torch.func: three steps of an attack on three models at once, by vmap and grad."""

from __future__ import annotations

import torch
from digits import data
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from rai_toolbox.functional import normalize, project_l2_ball


def main() -> Tensor:
    """The loss of each model before and after the attack, shape (3, 2)."""
    x, y = (t[:100] for t in data())
    torch.manual_seed(0)
    models = [nn.Linear(64, 10) for _ in range(3)]
    params, buffers = stack_module_state(models)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], delta: Tensor) -> Tensor:
        return cross_entropy(functional_call(models[0], (p, b), (x + delta,)), y, reduction="sum")

    def attacked(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        delta = torch.zeros_like(x)
        for _ in range(3):
            delta = delta + 0.3 * normalize(grad(loss, argnums=2)(p, b, delta))
            delta = project_l2_ball(delta, 0.5)
        return torch.stack([loss(p, b, torch.zeros_like(x)), loss(p, b, delta)])

    return vmap(attacked)(params, buffers)


if __name__ == "__main__":
    for before, after in main().tolist():
        print(f"loss: {before:.0f} to {after:.0f}")
