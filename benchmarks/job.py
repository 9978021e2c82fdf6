"""The job that benchmarks time: images, the networks trained on them, and what to forget.

500 examples to forget, 4,500 to retain, 1,000 to test on, batches of 128. The images are made here, classes of noise
around a pattern of their own, so that nothing is downloaded: the work is that of CIFAR-10.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from delfast.experiments.datasets import Batches
from delfast.experiments.networks import factory
from delfast.unlearning import train

MODELS = ("resnet18", "vit")
LAYOUT = {"resnet18": torch.channels_last, "vit": torch.contiguous_format}  # as oneDNN has it fastest
FORGET, TRAIN, TEST, BATCH = 500, 5000, 1000, 128
Images = tuple[Tensor, Tensor]


@lru_cache
def data() -> tuple[Images, Images, Tensor, Tensor]:
    """Return the images of the job on a CPU, as ``images_of`` does."""
    return images_of(TRAIN, TEST)


def images_of(train: int, test: int, side: int = 32) -> tuple[Images, Images, Tensor, Tensor]:
    """Return training and test images with targets, and the training set's mean and deviation.

    Images are (N, 3, side, side) uint8; ``side`` is a multiple of 8.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = interpolate(torch.randn(10, 3, 8, 8, generator=generator), scale_factor=side // 8)

    def images(count: int) -> Images:
        targets = torch.randint(0, 10, (count,), generator=generator)
        noise = 2 * torch.randn(count, 3, side, side, generator=generator)
        return (128 + 32 * (patterns[targets] + noise)).clamp(0, 255).to(torch.uint8), targets

    train_set, test_set = images(train), images(test)
    scaled = train_set[0].float() / 255
    return train_set, test_set, scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))


def batches(images: Images, batch_size: int = BATCH, **options: Any) -> Batches:
    *_, mean, std = data()
    return Batches(*images, mean, std, batch_size=batch_size, **options)


def part(images: Images, where: slice) -> Images:
    return images[0][where], images[1][where]


@lru_cache
def original(name: str) -> nn.Module:
    """Return a network trained on all training images, as fast as possible. Copy it; do not change it."""
    torch.manual_seed(0)
    model = factory(name, 10, 3, 32)().to(memory_format=LAYOUT[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, batches(data()[0], shuffle=True), optimizer, epochs=2, precision="bf16")
    return model


def forget_set() -> Batches:
    return batches(part(data()[0], slice(FORGET)))


def retain_set(**options: Any) -> Batches:
    return batches(part(data()[0], slice(FORGET, None)), **options)


def precision_of(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
