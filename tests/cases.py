"""One source of sample inputs: the awkward ones by default."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.ops.layout import row_length

PATIENCE = 1800  # seconds: only a process that hangs takes so long, on the slowest and busiest machine too

SHAPES = [
    (),
    (1,),
    (0,),
    (17,),
    (5, 0),
    (1, 1),
    (3, 1),
    (7, 9),
    (1, 65, 48),
    (8, 1, 3, 3),
    (16, 3, 3, 3),
    (5, 31, 3, 3),
    (33, 1000),
    (2, 4608),
    (3, 20000),
    (4, 6, 2, 3, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None) -> Any:
    """(theta, grad): a list of every awkward shape."""
    generator = torch.Generator().manual_seed(seed)
    theta = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    grad = [torch.randn(shape, generator=generator).to(grad_dtype or dtype) for shape in SHAPES]
    return theta, grad


def strided(tensors: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the values in other memory: channels-last, slices of wider tensors, transposed."""
    yield "contiguous", [t.clone() for t in tensors]
    yield "channels_last", [_channels_last(t) for t in tensors]
    yield "sliced", [_sliced(t) for t in tensors]
    yield "transposed", [_transposed(t) for t in tensors]


def _channels_last(t: Tensor) -> Tensor:
    """Dim 1 innermost, for any ndim > 2 (torch's own memory formats know 4 and 5 only)."""
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1) if t.ndim > 2 else t.clone()


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1) if t.ndim > 1 else t.clone()


def _sliced(t: Tensor) -> Tensor:
    if t.ndim == 0:
        return t.clone()
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    wide[..., 1 : 1 + t.shape[-1]] = t
    return wide[..., 1 : 1 + t.shape[-1]]


def top_h(tensors: list[Tensor], fraction: float = 0.1) -> list[int]:
    return [max(1, int(fraction * row_length(t.shape))) for t in tensors]


@dataclass(frozen=True)
class Layer:
    """The geometry of a convolution of 1 to 3 dimensions; a linear layer is one of kernel 1."""

    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    examples: int = 3

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation, groups."""
        dims = len(self.size)
        return (
            list(self.stride) or [1] * dims,
            list(self.padding) or [0] * dims,
            list(self.dilation) or [1] * dims,
            self.groups,
        )

    @property
    def out(self) -> list[int]:
        geometry = zip(self.size, self.kernel, *self.settings[:3], strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]

    def operands(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """(sums, inputs, output_grad), contiguous; float32 sums (float64 for float64), not zero."""
        wide = torch.promote_types(dtype, torch.float32)
        return (
            torch.rand(self.out_channels, self.in_channels // self.groups, *self.kernel, dtype=wide),
            torch.randn(self.examples, self.in_channels, *self.size).to(dtype),
            torch.randn(self.examples, self.out_channels, *self.out).to(dtype),
        )


LAYERS = {
    "linear": Layer(33, 20, (5,), (1,)),
    "linear, one position": Layer(40, 15, (1,), (1,), examples=9),
    "1x1, one pixel, grouped": Layer(12, 6, (1, 1), (1, 1), groups=3, examples=9),
    "no examples": Layer(3, 4, (5,), (3,), examples=0),
    "one example": Layer(17, 5, (6, 6), (3, 3), padding=(1, 1), examples=1),
    "one channel each": Layer(1, 1, (5, 5), (5, 5)),
    "conv1d": Layer(5, 33, (17,), (3,), (2,), (2,), (2,)),
    "stem": Layer(3, 64, (9, 8), (3, 3), padding=(1, 1)),
    "7x7 stem": Layer(3, 8, (15, 17), (7, 7), (2, 2), (3, 3)),
    "3x3": Layer(32, 29, (6, 6), (3, 3), padding=(1, 1)),
    "odd": Layer(37, 13, (7, 9), (3, 2), (2, 1), (1, 0)),
    "dilated": Layer(19, 15, (9, 8), (3, 3), padding=(2, 3), dilation=(2, 3)),
    "downsample": Layer(24, 48, (7, 8), (1, 1), (2, 2)),
    "one output channel": Layer(48, 1, (6, 5), (3, 3)),
    "mostly padding": Layer(16, 10, (1, 2), (3, 5), padding=(1, 4)),
    "conv3d": Layer(4, 6, (5, 6, 7), (3, 2, 3), (1, 2, 1), (1, 1, 1), (1, 1, 2)),
    "grouped": Layer(8, 12, (6, 6), (3, 3), padding=(1, 1), groups=4),
    "depthwise": Layer(70, 70, (6, 5), (3, 3), padding=(1, 1), groups=70),
    "depthwise, multiplier 3": Layer(35, 105, (6, 5), (3, 3), (2, 1), (1, 0), groups=35),
    "depthwise conv3d": Layer(18, 18, (3, 4, 5), (2, 1, 3), (1, 2, 1), groups=18),
}


class Everything(nn.Module):
    """One of each layer that localization must know: all convolutions, norms, an embedding, tied and frozen and
    0-dimensional parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(4, 8, 1, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv3 = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.layer_norm = nn.LayerNorm(2)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight  # tied
        self.head = nn.Linear(2, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.group_norm(self.conv1(self.embedding(tokens).transpose(1, 2)))  # (N, 8, T)
        x = self.batch_norm(self.conv2(x.unsqueeze(1)))  # (N, 4, 8, T)
        x = self.transposed(self.grouped(self.depthwise(x)))  # (N, 4, 16, 2T)
        x = self.conv3(x.unsqueeze(1)).mean(dim=(2, 3, 4))  # (N, 2)
        x = self.frozen(self.layer_norm(x)) * self.temperature
        return self.head(self.second(self.first(x).relu()))


def everything_batches(examples: int = 10, batch_size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(tokens, target) batches for Everything; the last is short."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (examples, 6), generator=generator)
    targets = torch.randint(0, 3, (examples,), generator=generator)
    return list(zip(tokens.split(batch_size), targets.split(batch_size), strict=True))


class SmallNet(nn.Module):
    """A small convolutional classifier of (N, 3, 8, 8) images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()
        )
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


def image_batches(examples: int = 40, batch_size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(examples, 3, 8, 8, generator=generator)
    targets = torch.randint(0, 10, (examples,), generator=generator)
    return list(zip(images.split(batch_size), targets.split(batch_size), strict=True))


def resnet18(num_classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the CIFAR stem: 11,173,962 parameters."""
    from delfast.experiments.networks import build

    return build("resnet18", num_classes, 3, 32)


Pair = namedtuple("Pair", "image label")


def losses_of(image: Callable[[Any], Any], label: Callable[[Any], Any]) -> Any:
    return lambda model, batch: functional.cross_entropy(model(image(batch)), label(batch), reduction="none")


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: a mapping that is no dict, with attributes of its own."""

    def __init__(self, data: Any, tokens: Any) -> None:
        super().__init__(data)
        self.tokens = tokens


class ReadOnly(Mapping):  # type: ignore[type-arg]
    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


EIGHT = Pair(*image_batches(8, 8)[0])
VALUES = EIGHT._asdict()
by_key = losses_of(lambda b: b["image"], lambda b: b["label"])
FORMS: dict[str, tuple[Any, Any]] = {
    "namedtuple": (EIGHT, losses_of(lambda b: b.image, lambda b: b.label)),
    "nested": ({"both": [EIGHT, "text"]}, losses_of(lambda b: b["both"][0].image, lambda b: b["both"][0].label)),
    "dict": (VALUES, by_key),
    "OrderedDict": (OrderedDict(VALUES), by_key),
    "UserDict with attributes": (Encoding(VALUES, ["a"]), by_key),
    "mapping": (ReadOnly(VALUES), by_key),
    "MappingProxyType": (MappingProxyType(VALUES), by_key),
}
