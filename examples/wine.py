"""A table to evaluate: 178 wines of scikit-learn, 13 measurements each, three growers to tell apart.

rai-toolbox evaluate --model examples/wine.py:model --data examples/wine.py:data --frozen alcohol
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_wine
from torch import nn

WINE: Any = load_wine()
# In standard deviations: an epsilon of 1 means the same for each measurement.
X = torch.tensor((WINE.data - WINE.data.mean(0)) / WINE.data.std(0), dtype=torch.float32)
Y = torch.tensor(WINE.target)


def data() -> dict[str, Any]:
    """Every second wine, which the model has not seen, and what to call things in the report."""
    return {"x": X[1::2], "y": Y[1::2], "feature_names": WINE.feature_names, "class_names": WINE.target_names}


def model() -> nn.Module:
    """Two layers, trained on the other half."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[::2]), Y[::2]).backward()
        optimizer.step()
    return net
