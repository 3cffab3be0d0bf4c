"""Stochastic weight averaging around a scheduled, normalized optimizer."""

from __future__ import annotations

import torch
from digits import accuracy, classifier, data
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import SWALR, AveragedModel

from rai_toolbox.optim import L2NormedGradientOptim


def main() -> tuple[float, float]:
    """The accuracy of the last and of the averaged weights."""
    x, y = data()
    model = classifier()
    averaged = AveragedModel(model)
    optim = L2NormedGradientOptim(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9)
    schedule = SWALR(optim, swa_lr=0.05, anneal_epochs=10)
    for n, batch in enumerate(torch.randperm(len(x)).split(64)[:28]):
        optim.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optim.step()
        schedule.step()
        if n >= 10:
            averaged.update_parameters(model)
    return accuracy(model), accuracy(averaged)


if __name__ == "__main__":
    print("accuracy: {:.3f}, averaged {:.3f}".format(*main()))
