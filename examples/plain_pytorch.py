"""Unlearn in an ordinary PyTorch training script: four lines of delfast around an unchanged training loop."""

import copy

import torch
from common import WRONG, digits, report
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import delfast


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    """Run the existing training job, which contains nothing about masks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for _ in range(epochs):
        for images, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    everything = TensorDataset(*digits())
    forget = DataLoader(Subset(everything, range(WRONG)), batch_size=64)
    retain = DataLoader(Subset(everything, range(WRONG, len(everything))), batch_size=64, shuffle=True)

    model = network()
    train(model, DataLoader(everything, batch_size=64, shuffle=True), epochs=20, lr=1e-3)
    before = copy.deepcopy(model)

    mask = delfast.localize(model, forget, budget=0.3)
    delfast.reset_(model, mask, init=network)
    with delfast.compact(model, mask):
        train(model, retain, epochs=10, lr=1e-3)

    report(before, model, mask)


if __name__ == "__main__":
    main()
