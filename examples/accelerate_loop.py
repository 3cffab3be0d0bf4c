"""A loop of one's own with accelerate: the optimizer goes through `prepare` like any other."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from digits import accuracy, classifier, data
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.optim import SignedGradientOptim


def main() -> float:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = classifier()
    optim = SignedGradientOptim(model.parameters(), torch.optim.SGD, lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.1, total_iters=30)
    loader = DataLoader(TensorDataset(*data()), batch_size=32, shuffle=True)
    model, optim, loader, schedule = accelerator.prepare(model, optim, loader, schedule)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            schedule.step()
            optim.zero_grad()
    return accuracy(accelerator.unwrap_model(model))


if __name__ == "__main__":
    print(f"accuracy: {main():.3f}")
