"""torch.compile of a training step that holds the optimizer.

Not with `fullgraph=True`: the `step` of any optimizer breaks the graph. A learning rate that a scheduler changes
must be a tensor: every change of a float compiles anew.
"""

from __future__ import annotations

import torch
from digits import accuracy, classifier, data
from torch import Tensor
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import L2NormedGradientOptim


def main(backend: str = "inductor") -> float:
    x, y = data()
    model = classifier()
    optim = L2NormedGradientOptim(model.parameters(), torch.optim.SGD, lr=0.5, foreach=True)

    @torch.compile(backend=backend)
    def step(x: Tensor, y: Tensor) -> Tensor:
        optim.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optim.step()
        return loss.detach()

    for batch in torch.randperm(len(x)).split(64)[:28]:
        step(x[batch], y[batch])
    return accuracy(model)


if __name__ == "__main__":
    print(f"accuracy: {main():.3f}")
