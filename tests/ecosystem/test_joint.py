"""One optimizer out of several where people train: Lightning, accelerate, the Trainer, one scheduler, one scaler."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.optim import (
    AveragedGradientOptim,
    ChainedParamTransformingOptimizer,
    JointOptimizer,
    OrthogonalizedGradientOptim,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def members(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    muon = ChainedParamTransformingOptimizer(
        partial(AveragedGradientOptim, decay=0.95, mix=0.95),
        OrthogonalizedGradientOptim,
        params=[p for p in model.parameters() if p.ndim == 2],
        lr=0.05,
        param_ndim=2,
    )
    return muon, torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)


def batches() -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=gen), torch.randint(3, (8,), generator=gen)) for _ in range(6)]


def by_hand(epochs: int) -> list[Tensor]:
    """The parameters after a loop that steps and schedules every member for itself."""
    model = network()
    optimizers = members(model)
    schedulers = [ExponentialLR(optim, 0.5) for optim in optimizers]
    for _ in range(epochs):
        for x, y in batches():
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            for optim in optimizers:
                optim.step()
        for scheduler in schedulers:
            scheduler.step()
    return [p.detach() for p in model.parameters()]


def assert_same(model: nn.Module, expected: list[Tensor]) -> None:
    for p, q in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, q)


def lightning_run(folder: Path, epochs: int, resume: Path | None = None) -> tuple[nn.Module, Any]:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optim = JointOptimizer(*members(self.model))
            return [optim], [ExponentialLR(optim, 0.5)]

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = TensorDataset(*(torch.cat(some) for some in zip(*batches(), strict=True)))
    trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=resume)
    return module, trainer


@pytest.mark.slow
# Lightning 2.6 asks its treespecs in a way that torch 2.13 deprecates, and would like more workers.
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_steps_schedules_and_resumes_it_as_one(tmp_path: Path) -> None:
    _, trainer = lightning_run(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    module, trainer = lightning_run(tmp_path, 4, tmp_path / "middle.ckpt")
    assert_same(module, by_hand(4))
    assert len(trainer.optimizers) == 1


def test_accelerate_prepares_saves_and_loads_it_as_one(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optim = JointOptimizer(*members(model))
        return accelerator, *accelerator.prepare(model, optim, ExponentialLR(optim, 0.5))

    def train(accelerator: Any, model: Any, optim: Any, scheduler: Any, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in batches():
                optim.zero_grad()
                accelerator.backward(cross_entropy(model(x), y))
                optim.step()
            scheduler.step()

    first = prepared()
    train(*first, epochs=1)
    first[0].save_state(str(tmp_path))
    other = prepared()
    other[0].load_state(str(tmp_path))
    train(*other, epochs=1)
    assert_same(other[1], by_hand(2))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_trainer_of_transformers_steps_and_resumes_it_as_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]

    def run(epochs: int, resume: str | None = None) -> Any:
        model = Model()
        optim = JointOptimizer(*members(model.net))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            save_strategy="epoch",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 0.9**t)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optim, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(2)
    resumed = run(2, resume=str(tmp_path / "checkpoint-6"))
    assert_same(resumed, [p.detach() for p in whole.parameters()])
    assert not torch.equal(whole.net[0].weight, network()[0].weight)


def test_one_scaler_skips_all_members_and_memory_is_kept() -> None:
    model = network()
    optim = JointOptimizer(*members(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)  # pyright: ignore
    for x, y in batches():
        optim.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(optim)
        scaler.update()
    before = [v.clone() for p in model.parameters() for v in (p.detach(), *optim.state[p].values()) if v is not None]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.step(optim)
    scaler.update()
    now = [v for p in model.parameters() for v in (p.detach(), *optim.state[p].values()) if v is not None]
    assert all(map(torch.equal, now, before))
    for p, q in zip(model.parameters(), by_hand(1), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


def test_members_may_be_compiled() -> None:
    model = network()
    optim = JointOptimizer(*members(model))
    optim.compile(backend="eager")
    for x, y in batches():
        optim.zero_grad()
        cross_entropy(model(x), y).backward()
        optim.step()
    assert_same(model, by_hand(1))
