r"""A regression to evaluate: 442 patients of scikit-learn, ten measurements each, how far their diabetes went.

rai-toolbox evaluate --model examples/diabetes.py:model --data examples/diabetes.py:data \
    --task regression --frozen age,sex
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import nn

DIABETES: Any = load_diabetes()
X = torch.tensor(DIABETES.data / DIABETES.data.std(0), dtype=torch.float32)
Y = torch.tensor(DIABETES.target, dtype=torch.float32)


def data() -> dict[str, Any]:
    """Every third patient, whom the model has not seen."""
    return {"x": X[::3], "y": Y[::3], "feature_names": DIABETES.feature_names}


def model() -> nn.Module:
    """Two layers, trained on the others; its answer has the unit of the data."""
    torch.manual_seed(0)
    known = torch.arange(len(X)) % 3 != 0
    last = nn.Linear(16, 1)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), last)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=1e-2)
    target = (Y[known] - 150) / 75
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(X[known])[:, 0], target).backward()
        optimizer.step()
    with torch.no_grad():
        last.weight.mul_(75)
        last.bias.mul_(75).add_(150)
    return net
