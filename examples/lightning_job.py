"""Unlearn in a Lightning job: the module and the Trainer stay unchanged."""

import copy

import lightning
import torch
from common import WRONG, digits, report
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import delfast


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class Classifier(lightning.LightningModule):
    """The existing training job, which contains nothing about masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)


def fit(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=1.0, **quiet)
    trainer.fit(Classifier(model), loader)


def main() -> None:
    lightning.seed_everything(0)
    everything = TensorDataset(*digits())
    forget, retain = Subset(everything, range(WRONG)), Subset(everything, range(WRONG, len(everything)))

    model = network()
    fit(model, DataLoader(everything, batch_size=64, shuffle=True), epochs=40)
    before = copy.deepcopy(model)

    mask = delfast.localize(model, DataLoader(forget, batch_size=64), budget=0.3)
    delfast.reset_(model, mask, init=network)
    with delfast.compact(model, mask):
        fit(model, DataLoader(retain, batch_size=64, shuffle=True), epochs=10)

    report(before, model, mask)


if __name__ == "__main__":
    main()
