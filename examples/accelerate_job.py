"""Unlearn in an Accelerate training script: the mask is applied before ``prepare``."""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import WRONG, digits, report
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import delfast


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def train(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Run the existing training job, which contains nothing about masks."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for images, targets in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(cross_entropy(prepared(images), targets))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.free_memory()


def main() -> None:
    set_seed(0)
    everything = TensorDataset(*digits())
    forget, retain = Subset(everything, range(WRONG)), Subset(everything, range(WRONG, len(everything)))

    model = network()
    train(model, DataLoader(everything, batch_size=32, shuffle=True), epochs=40)
    before = copy.deepcopy(model)

    mask = delfast.localize(model, DataLoader(forget, batch_size=64), budget=0.3)
    delfast.reset_(model, mask, init=network)
    with delfast.compact(model, mask):
        train(model, DataLoader(retain, batch_size=32, shuffle=True), epochs=10)

    report(before, model, mask)


if __name__ == "__main__":
    main()
