"""CritMem by its definition: one example at a time, in a copy of the network that is edited, by weight gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.localization.critical_channels import CriticalChannels

Found = tuple[list[tuple[str, int]], bool]  # channels in order, whether the prediction flipped


def channel_weights(model: nn.Module, head: str | None) -> dict[str, Tensor]:
    """Return the weights whose rows compete: those of every trainable convolution and linear layer except the head."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    wanted = {id(m.weight) for n, m in layers if m.weight.requires_grad and n != head}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def search_one(model: nn.Module, weights: dict[str, Tensor], image: Tensor, label: Tensor, most: int) -> Found:
    """Search one example, image (1, ...), label (1,). Zeroes rows of ``weights`` and restores them."""
    rows = [(name, row) for name, weight in weights.items() for row in range(len(weight))]
    channels: list[tuple[str, int]] = []
    values: list[Tensor] = []
    flipped = False
    while True:
        logits = model(image)
        flipped = int(logits.argmax(dim=1)) != int(label)
        if flipped or len(channels) == most:
            break
        gradients = torch.autograd.grad(functional.cross_entropy(logits, label), list(weights.values()))
        with torch.no_grad():
            products = zip(weights.values(), gradients, strict=True)
            scores = -torch.cat([(weight * gradient).flatten(1).sum(dim=1) for weight, gradient in products])
            best = int(scores.argmax())
            if not scores[best] > 0:
                break
            name, row = rows[best]
            channels.append((name, row))
            values.append(weights[name][row].clone())
            weights[name][row] = 0
    with torch.no_grad():
        for (name, row), value in zip(channels, values, strict=True):
            weights[name][row] = value
    return channels, flipped


def loop(
    model: nn.Module, batches: Iterable[Any], max_channels: int, head: str | None = "head", only: Iterable[int] = ()
) -> list[Found]:
    """Search every example of the batches, or ``only`` these of each, in a copy of the model in eval mode."""
    model = copy.deepcopy(model)
    weights = channel_weights(model, head)
    return [
        search_one(model, weights, images[x : x + 1], labels[x : x + 1], max_channels)
        for images, labels in batches
        for x in (only or range(len(images)))
    ]


def as_found(result: CriticalChannels) -> list[Found]:
    return [(list(example.channels), example.flipped) for example in result.examples]
