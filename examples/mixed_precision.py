"""Float16 with a GradScaler: gradients are unscaled before they are normalized; a step with an infinity is skipped."""

from __future__ import annotations

import torch
from digits import accuracy, classifier, data
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import L2NormedGradientOptim


def main() -> float:
    x, y = data()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x, y = classifier().to(device), x.to(device), y.to(device)
    optim = L2NormedGradientOptim(model.parameters(), torch.optim.Adam, lr=0.01, fused=True, param_ndim=None)
    scaler = torch.amp.GradScaler(device)
    for batch in torch.randperm(len(x)).split(64)[:40]:
        with torch.autocast(device, dtype=torch.float16):
            loss = cross_entropy(model(x[batch]), y[batch])
        optim.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optim)
        scaler.update()
    return accuracy(model.cpu())


if __name__ == "__main__":
    print(f"accuracy: {main():.3f}")
