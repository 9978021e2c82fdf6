"""The networks of benchmarks.gpu, with a batch for each: as they are, and small enough for the CPU ("tiny")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from delfast.experiments.networks import build

CLASSES = 10
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """A decoder of tokens (N, T) int64 that classifies by the mean over its positions: (N, classes)."""

    def __init__(self, width: int, layers: int, heads: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.register_buffer("places", torch.arange(tokens), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(self.places.expand_as(tokens))
        classes: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return classes


def vit_b_16() -> nn.Module:
    """Return torchvision's ViT-B/16. Its head is zero there, so that nothing before it has a gradient: not here."""
    network = torchvision.models.vit_b_16()
    nn.init.trunc_normal_(network.heads.head.weight, std=0.02)
    return network  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Workload:
    """``make`` returns a newly initialized network. ``shape``: of an example's input, of tokens where it is (T,)."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    classes: int = CLASSES
    vocabulary: int = 0

    @property
    def on(self) -> str:
        size = f"{self.shape[-1]} px" if len(self.shape) == 3 else f"{self.shape[0]} tokens"
        return f"{self.name}, {size}, batch {self.batch_size}"

    def network(self, device: torch.device) -> nn.Module:
        """Return the network on the device, channels-last, initialized from seed 0."""
        torch.manual_seed(0)
        return self.make().to(device).to(memory_format=torch.channels_last)

    def batch(self, device: torch.device) -> Batch:
        """Return one batch on the device; images are channels-last."""
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(0, self.classes, (self.batch_size,), generator=generator).to(device)
        if len(self.shape) == 1:
            tokens = torch.randint(0, self.vocabulary, (self.batch_size, *self.shape), generator=generator)
            return tokens.to(device), targets
        images = torch.randn(self.batch_size, *self.shape, generator=generator).to(device)
        return images.contiguous(memory_format=torch.channels_last), targets


def small_network() -> nn.Module:
    """Return a network of a convolution, a BatchNorm and a linear layer, to try the code on the CPU."""
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    layers = [convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*layers)


def workloads(tiny: bool) -> Iterator[Workload]:
    """Yield ResNet-18 at 32 px, ResNet-50 and ViT-B/16 at 224 px, and a decoder of 512 tokens.

    With ``tiny`` a small network of images and a small decoder.
    """
    if tiny:
        yield Workload("small network", small_network, (3, 8, 8), 4)
        tokens = partial(Decoder, 16, layers=1, heads=2, tokens=6, vocabulary=12)
        yield Workload("small decoder", tokens, (6,), 4, vocabulary=12)
        return
    yield Workload("resnet18", partial(build, "resnet18", CLASSES, 3, 32), (3, 32, 32), 128)
    yield Workload("resnet50", torchvision.models.resnet50, (3, 224, 224), 64, classes=1000)
    yield Workload("vit_b_16", vit_b_16, (3, 224, 224), 64, classes=1000)
    decoder = partial(Decoder, 2048, layers=4, heads=16, tokens=512, vocabulary=8192)
    yield Workload("decoder of width 2048", decoder, (512,), 8, vocabulary=8192)
