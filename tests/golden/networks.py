"""Networks, batches and losses whose gradients every machine computes alike, to the last bit.

All values are small integers, or integers over a power of two, so that every sum is exact in any order, and nothing
depends on the BLAS, oneDNN or the instruction set. ``tests/test_golden.py`` checks that against float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5


class Interrupted(Exception):
    """Training was stopped between two epochs."""


class Batches:
    """Batches in a fixed order. Iteration over the epoch ``stop`` raises Interrupted."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], stop: int | None = None) -> None:
        self.batches, self.stop = batches, stop

    def set_epoch(self, epoch: int) -> None:
        if epoch == self.stop:
            raise Interrupted

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Exact(nn.Module):
    """A convolution, a norm, a grouped convolution, a transposed one and a head, for images (N, 2, 5, 5)."""

    scale, eps = 1, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=self.eps)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(12, 6, 2)
        self.head = nn.Linear(6, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-3, 4, parameter.shape) / self.scale)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu()
        x = self.transposed(self.grouped(x).relu()).sum(dim=(2, 3))
        logits: Tensor = self.head(x)
        return logits


class Classifier(Exact):
    """``Exact`` with weights so small that its softmax is not saturated: not exact where the softmax is used."""

    scale, eps = 16, 1e-5


def seeded(kind: type[Exact], seed: int = 0) -> Exact:
    """Build a network from a seed."""
    torch.manual_seed(seed)
    return kind()


def batches(examples: int, seed: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return (images, labels) of small integers."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (examples, 2, 5, 5), generator=generator).float()
    labels = torch.randint(0, CLASSES, (examples,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def linear_in_logits(model: nn.Module, batch: Any) -> Tensor:
    """(N,): the logits times integers that depend on the label, summed."""
    images, labels = batch
    coefficients = (torch.arange(CLASSES) * 3 + labels[:, None]) % CLASSES - 2
    return (model(images) * coefficients).sum(1)


def linear_in_weights(model: Any, batch: Any) -> Tensor:
    """(N,): all weights times integers, summed, times an integer of the example: gradients depend on no weight."""
    images, labels = batch
    layers = (model.conv, model.norm, model.grouped, model.transposed, model.head)
    terms = [(layer.weight * pattern(layer.weight)).sum() for layer in layers]
    return torch.stack(terms).sum() * (1 + labels + images[:, 0, 0, 0])


def pattern(tensor: Tensor) -> Tensor:
    """Integers from -5 to 5 of the tensor's shape and dtype, by position."""
    return (torch.arange(tensor.numel()) * 37 % 11 - 5).to(tensor.dtype).view(tensor.shape)
