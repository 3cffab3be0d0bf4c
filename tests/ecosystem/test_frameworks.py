"""What a framework does beyond calling `step`: resuming, accumulating, clipping, low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.optim import L2NormedGradientOptim, L2ProjectedOptim


def _module() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Linear(6, 3)

        def training_step(self, batch: Any) -> torch.Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optim = L2ProjectedOptim(self.parameters(), torch.optim.Adam, lr=0.1, epsilon=1.0)
            return [optim], [torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)]

    return Module()


def _fit(module: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    import lightning

    gen = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 6, generator=gen), torch.randint(3, (32,), generator=gen))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume)
    return trainer


# Lightning 2.6 asks its treespecs in a way that torch 2.13 deprecates, and would like more workers.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_lightning_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = _module(), _module(), _module()
    _fit(whole, tmp_path, 4)
    trainer = _fit(first, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    _fit(second, tmp_path, 4, tmp_path / "middle.ckpt")
    for x, y in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(first.model.weight, second.model.weight)
    assert (whole.model.weight.norm(dim=1) < 1.001).all()


def test_bfloat16_autocast_trains() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optim = L2NormedGradientOptim(model.parameters(), lr=0.1, param_ndim=None)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = cross_entropy(model(x), y)
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
        assert model.weight.grad is not None
        assert model.weight.grad.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert losses[-1] < losses[0]
