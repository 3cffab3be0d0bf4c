"""A LightningModule that trains with a projected optimizer and a scheduler; nothing in it knows of the wrapper."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from digits import accuracy, classifier, data
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.optim import L2ProjectedOptim


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()

    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        optim = L2ProjectedOptim(self.parameters(), torch.optim.Adam, lr=0.03, epsilon=4.0)
        return [optim], [torch.optim.lr_scheduler.StepLR(optim, step_size=1, gamma=0.5)]


def main() -> float:
    loader = DataLoader(TensorDataset(*data()), batch_size=64)
    module = Digits()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, loader)
    return accuracy(module.model)


if __name__ == "__main__":
    print(f"accuracy: {main():.3f}")
