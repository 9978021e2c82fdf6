"""A small network, batches for it, and predictions of random logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_model(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, classes))


def batches(count: int = 50, size: int = 7, seed: int = 1) -> list[tuple[Tensor, ...]]:
    numbers = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(count, 5, generator=numbers), torch.randint(0, 4, (count,), generator=numbers)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def made(count: int, scale: float, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Predictions of random logits, the true class's raised by ``scale``."""
    numbers = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=numbers)
    logits = torch.randn(count, classes, generator=numbers)
    logits[torch.arange(count), targets] += scale
    return logits.log_softmax(1), targets
