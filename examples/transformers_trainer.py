"""The Trainer of transformers with `optimizers=(optim, scheduler)`, on a tiny model that reads a digit row by row."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from digits import data
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from rai_toolbox.optim import TopQGradientOptimizer


class Scans(torch.utils.data.Dataset):
    """A digit as 8 embeddings, its rows: nothing is downloaded."""

    def __init__(self, n: int) -> None:
        self.x, self.y = (t[:n] for t in data())

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"inputs_embeds": self.x[i].view(8, 8), "labels": self.y[i]}


def main(n: int = 512) -> tuple[float, float]:
    """The loss at the beginning and at the end."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=10,
        max_position_embeddings=8,
    )
    model = BertForSequenceClassification(config)
    optim = TopQGradientOptimizer(model.parameters(), torch.optim.AdamW, q=0.5, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.1, total_iters=50)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=4,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Scans(n), optimizers=(optim, scheduler))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    first, last = main()
    print(f"loss: {first:.2f} to {last:.2f}")
