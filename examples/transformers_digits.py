"""A classifier of transformers under `rai-toolbox evaluate`, with data of dicts: nothing is downloaded.

rai-toolbox evaluate --model transformers_digits.py:model --data transformers_digits.py:test_data --budget quick
"""

from __future__ import annotations

from typing import Any

import torch
from digits import data
from transformers import ViTConfig, ViTForImageClassification


class Digits(torch.utils.data.Dataset):
    """Items as the data sets of Hugging Face have them: `pixel_values` and `label`."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x.reshape(-1, 1, 8, 8), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.x[i], "label": int(self.y[i])}


def model() -> ViTForImageClassification:
    """A tiny vision transformer, trained for a few seconds; it returns an object that holds `logits`."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    net = ViTForImageClassification(config)
    x, y = data()
    x = x[:1200].reshape(-1, 1, 8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for step in range(150):
        rows = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x[rows], labels=y[:1200][rows]).loss.backward()
        optimizer.step()
    return net.eval()


def test_data() -> Digits:
    """Held-out digits."""
    x, y = data()
    return Digits(x[1200:1220], y[1200:1220])
