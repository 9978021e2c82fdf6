"""DEL as it is commonly written in plain PyTorch: the other side of the whole-job benchmark.

Dense masks multiplied into the gradients, ``torch.optim.SGD`` over every parameter, a double argsort, three sets
evaluated after each epoch, float32 in the default layout, a DataLoader over tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.baselines import channel_scores, double_argsort, expanded

Images = tuple[Tensor, Tensor]


def dataset(images: Images, mean: Tensor, std: Tensor) -> TensorDataset:
    """Return all images as normalized floats."""
    return TensorDataset((images[0] / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), images[1])


def accuracy(model: nn.Module, data: Dataset[Images]) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for images, targets in DataLoader(data, batch_size=128):
            right += int((model(images).argmax(1) == targets).sum())
    return 100 * right / len(data)  # type: ignore[arg-type]


def localize(model: nn.Module, forget: Dataset[Images], budget: float) -> dict[str, Tensor]:
    """Return name -> mask of 0 and 1: channels by the mean of their highest |θ g|."""
    model.eval()
    model.zero_grad()
    total = len(forget)  # type: ignore[arg-type]
    for images, targets in DataLoader(forget, batch_size=128, shuffle=True):
        (cross_entropy(model(images), targets, reduction="sum") / total).backward()
    names, theta = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    top_h = [max(1, int(0.1 * t[0].numel())) if t.ndim > 1 else 1 for t in theta]
    scores = expanded(channel_scores(theta, gradients, top_h), theta)
    flat = double_argsort(scores, int(budget * sum(t.numel() for t in theta))).float()
    parts = torch.split(flat, [t.numel() for t in theta])
    model.zero_grad()
    return {name: part.view_as(t) for name, part, t in zip(names, parts, theta, strict=True)}


def reset(model: nn.Module, mask: dict[str, Tensor], factory: Callable[[], nn.Module]) -> None:
    fresh = dict(factory().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(mask[name] * fresh[name] + (1 - mask[name]) * parameter)


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def finetune(
    model: nn.Module, mask: dict[str, Tensor], sets: dict[str, Dataset[Images]], epochs: int, lr: float
) -> dict[str, float]:
    """Train the masked entries on ``sets["retain"]``; return the last epoch's accuracies (percent) on all sets."""
    optimizer = optimizer_for(model, lr)
    loader = DataLoader(sets["retain"], batch_size=128, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader), lr * 0.01)
    accuracies: dict[str, float] = {}
    for _ in range(epochs):
        model.train()
        for images, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), targets).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad *= mask[name]
            optimizer.step()
            schedule.step()
        accuracies = {name: accuracy(model, data) for name, data in sets.items()}
    return accuracies
