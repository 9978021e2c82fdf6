"""Unlearn in a Hugging Face Trainer job, with the Trainer's own optimizer."""

import copy
import tempfile
from typing import Any

import torch
from common import WRONG, digits, report
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import delfast


def network() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    ))  # fmt: skip


def fit(model: torch.nn.Module, data: Dataset, epochs: int) -> None:
    """Run the existing training job, which contains nothing about masks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=2e-3, weight_decay=0.01,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()


def losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="none")


def main() -> None:
    set_seed(0)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(*digits(), strict=True)]
    model = network()
    fit(model, data, epochs=30)
    before = copy.deepcopy(model)

    forget = DataLoader(Subset(data, range(WRONG)), batch_size=64)
    mask = delfast.localize(model, forget, budget=0.3, loss_fn=losses)
    delfast.reset_(model, mask, init=network)
    with delfast.compact(model, mask):
        fit(model, Subset(data, range(WRONG, len(data))), epochs=10)

    report(before, model, mask, logits=lambda net, images: net(images).logits)


if __name__ == "__main__":
    main()
