"""Files of `torch.export` under `rai-toolbox evaluate`: of one batch size, as it writes them unless told, and of any.

python static_export.py
rai-toolbox evaluate --model static.pt2 --data digits.npz --budget quick
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from digits import classifier, data
from torch import nn


def main(folder: Path) -> None:
    """Write static.pt2, which takes batches of 4 only, dynamic.pt2, which takes any, and 24 digits."""
    x, y = data()
    net = classifier()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()
    net.eval()
    static = torch.export.export(net, (x[:4],))
    # The same with this works too, without filling batches up to four.
    dynamic = torch.export.export(net, (x[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(static, folder / "static.pt2")
    torch.export.save(dynamic, folder / "dynamic.pt2")
    np.savez(folder / "digits.npz", x=x[1200:1224].numpy(), y=y[1200:1224].numpy())


if __name__ == "__main__":
    main(Path())
