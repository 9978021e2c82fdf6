"""Published settings of the networks that are unlearned (DEL paper, arXiv 2412.02432, experimental setup).

The paper states DEL's own finetuning for CIFAR-10 / ResNet-18 alone. It is the default of ``delfast.unlearning.Del``,
and used on every data set and model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Epochs and learning rate of pretraining, and of retraining without the forget set."""

    epochs: int
    lr: float


PUBLISHED = {  # (data, model)
    ("cifar10", "resnet18"): Recipe(epochs=30, lr=0.1),
    ("svhn", "vit"): Recipe(epochs=30, lr=0.05),
    ("hub:clane9/imagenet-100", "resnet50"): Recipe(epochs=100, lr=0.1),
}


def method_recipe(data: str, model: str, method: str) -> dict[str, float]:
    """Return the hyperparameters that the paper states for a method on this data set and model alone: for "retrain"."""
    published = recipe(data, model)
    return {"epochs": published.epochs, "lr": published.lr} if method == "retrain" else {}


def recipe(data: str, model: str) -> Recipe:
    """Return the published recipe of a data set and a model; where there is none, that of CIFAR-10 / ResNet-18."""
    return PUBLISHED.get((data, model), PUBLISHED["cifar10", "resnet18"])
