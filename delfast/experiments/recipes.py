"""Published settings (DEL paper, arXiv 2412.02432, experimental setup)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Epochs and rates: ``epochs``, ``lr`` of pretraining and oracle, ``finetune_epochs``, ``finetune_lr`` of DEL."""

    epochs: int
    lr: float
    finetune_epochs: int
    finetune_lr: float


# (data, model); the paper states DEL's finetuning only for CIFAR-10, and the others use the same
PUBLISHED = {
    ("cifar10", "resnet18"): Recipe(epochs=30, lr=0.1, finetune_epochs=30, finetune_lr=0.015),
    ("svhn", "vit"): Recipe(epochs=30, lr=0.05, finetune_epochs=30, finetune_lr=0.015),
    ("hub:clane9/imagenet-100", "resnet50"): Recipe(epochs=100, lr=0.1, finetune_epochs=30, finetune_lr=0.015),
}


def method_recipe(data: str, model: str, method: str) -> dict[str, float]:
    """Epochs and rate that the DEL paper states for DEL and for retraining; empty for other methods."""
    of = recipe(data, model)
    if method == "retrain":
        return {"epochs": of.epochs, "lr": of.lr}
    return {"epochs": of.finetune_epochs, "lr": of.finetune_lr} if method == "del" else {}


def recipe(data: str, model: str) -> Recipe:
    """The published recipe of a pair of data and model, or the recipe of CIFAR-10 with ResNet-18 if there is none."""
    return PUBLISHED.get((data, model), PUBLISHED["cifar10", "resnet18"])
