"""CritMem by its definition: one example at a time, in an edited copy of the weights, by weight gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Found = tuple[list[tuple[str, int]], bool]  # channels in order, whether the prediction flipped


def channel_weights(model: nn.Module, head: str | None) -> dict[str, Tensor]:
    """The weights whose rows compete: every trainable convolution's and linear layer's but the head's."""
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    names = {id(m.weight): f"{n}.weight" for n, m in reversed(modules) if m.weight.requires_grad and n != head}
    return {name: p for name, p in model.named_parameters() if names.get(id(p)) == name}


def search_one(model: nn.Module, weights: dict[str, Tensor], image: Tensor, label: Tensor, max_channels: int) -> Found:
    """image (1, ...), label (1,). The model is in eval mode."""
    edited = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    channels: list[tuple[str, int]] = []
    while True:
        logits = torch.func.functional_call(model, edited, (image,))
        if int(logits.argmax(dim=1)) != int(label):
            return channels, True
        if len(channels) == max_channels:
            return channels, False
        gradients = torch.autograd.grad(functional.cross_entropy(logits, label), list(edited.values()))
        scores = [
            -(weight.detach() * gradient).flatten(1).sum(dim=1)
            for weight, gradient in zip(edited.values(), gradients, strict=True)
        ]
        best = int(torch.cat(scores).argmax())
        if not torch.cat(scores)[best] > 0:
            return channels, False
        rows = [(name, row) for name, of_layer in zip(edited, scores, strict=True) for row in range(len(of_layer))]
        name, row = rows[best]
        channels.append((name, row))
        weight = edited[name].detach().clone()
        weight[row] = 0
        edited[name] = weight.requires_grad_()


def loop(
    model: nn.Module, batches: Iterable[Any], max_channels: int, head: str | None = "head", only: Iterable[int] = ()
) -> list[Found]:
    """Every example of the batches, or ``only`` these of each."""
    weights = channel_weights(model, head)
    return [
        search_one(model, weights, images[x : x + 1], labels[x : x + 1], max_channels)
        for images, labels in batches
        for x in (only or range(len(images)))
    ]
