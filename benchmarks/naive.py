"""DEL as it is commonly written in plain PyTorch: the other side of the whole-job benchmarks.

Dense masks multiplied into the gradients, ``torch.optim.SGD`` over every parameter, a double argsort, three sets
evaluated after each epoch, float32 in the default layout, a DataLoader over tensors. On a GPU (``CardImages``): images
that lie there as bytes and are indexed and normalized there, channels-last, and bfloat16 autocast if asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.baselines import channel_scores, double_argsort, expanded

BATCH = 128
Images = tuple[Tensor, Tensor]


def dataset(images: Images, mean: Tensor, std: Tensor) -> TensorDataset:
    """Return all images as normalized floats."""
    return TensorDataset((images[0] / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), images[1])


class CardImages:
    """Batches of uint8 images (N, C, H, W) of any device: indexed, normalized and made channels-last there."""

    def __init__(self, images: Images, mean: Tensor, std: Tensor, shuffle: bool = False) -> None:
        self.images, self.targets = images
        self.mean, self.std = (values.view(-1, 1, 1) for values in (mean, std))
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Return the number of examples, as a Dataset does."""
        return len(self.targets)

    def __iter__(self) -> Iterator[Images]:
        device = self.images.device
        order = torch.randperm(len(self), device=device) if self.shuffle else torch.arange(len(self), device=device)
        for index in order.split(BATCH):
            images = (self.images[index].float() / 255 - self.mean) / self.std
            yield images.contiguous(memory_format=torch.channels_last), self.targets[index]


Data = Dataset[Images] | CardImages


def batches_of(data: Data, shuffle: bool = False) -> Iterable[Images]:
    if isinstance(data, CardImages):
        return CardImages((data.images, data.targets), data.mean, data.std, shuffle)
    return DataLoader(data, batch_size=BATCH, shuffle=shuffle)


def autocast(model: nn.Module, bf16: bool) -> torch.autocast:
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16)


def accuracy(model: nn.Module, data: Data, *, bf16: bool = False) -> float:
    model.eval()
    right: int | Tensor = 0
    with torch.no_grad(), autocast(model, bf16):
        for images, targets in batches_of(data):
            right += (model(images).argmax(1) == targets).sum()  # read once, at the end
    return 100 * int(right) / len(data)  # type: ignore[arg-type]


def localize(model: nn.Module, forget: Data, budget: float, *, bf16: bool = False) -> dict[str, Tensor]:
    """Return name -> mask of 0 and 1: channels by the mean of their highest |θ g|."""
    model.eval()
    model.zero_grad()
    total = len(forget)  # type: ignore[arg-type]
    for images, targets in batches_of(forget, shuffle=True):
        with autocast(model, bf16):
            loss = cross_entropy(model(images), targets, reduction="sum") / total
        loss.backward()
    names, theta = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    top_h = [max(1, int(0.1 * t[0].numel())) if t.ndim > 1 else 1 for t in theta]
    scores = expanded(channel_scores(theta, gradients, top_h), theta)
    flat = double_argsort(scores, int(budget * sum(t.numel() for t in theta))).float()
    parts = torch.split(flat, [t.numel() for t in theta])
    model.zero_grad()
    masks = [part.view(t.shape) for part, t in zip(parts, theta, strict=True)]
    return {  # in the layout of the parameter, as its gradient is
        name: mask if t.is_contiguous() else torch.empty_like(t).copy_(mask)
        for name, mask, t in zip(names, masks, theta, strict=True)
    }


def reset(model: nn.Module, mask: dict[str, Tensor], factory: Callable[[], nn.Module]) -> None:
    device = next(model.parameters()).device
    fresh = dict(factory().to(device).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(mask[name] * fresh[name] + (1 - mask[name]) * parameter)


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def finetune(
    model: nn.Module, mask: dict[str, Tensor], sets: dict[str, Data], epochs: int, lr: float, *, bf16: bool = False
) -> dict[str, float]:
    """Train the masked elements on ``sets["retain"]``; return the last epoch's accuracies (percent) on all sets."""
    optimizer = optimizer_for(model, lr)
    steps = -(-len(sets["retain"]) // BATCH)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps, lr * 0.01)
    accuracies: dict[str, float] = {}
    for _ in range(epochs):
        model.train()
        for images, targets in batches_of(sets["retain"], shuffle=True):
            optimizer.zero_grad()
            with autocast(model, bf16):
                loss = cross_entropy(model(images), targets)
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad *= mask[name]
            optimizer.step()
            schedule.step()
        accuracies = {name: accuracy(model, data, bf16=bf16) for name, data in sets.items()}
    return accuracies
