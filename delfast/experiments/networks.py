"""Networks by name: torchvision's ResNets, with a stem for small images, vit-pytorch's ViT, and a small CNN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

from torch import nn

from delfast.errors import InputError
from delfast.extras import extra

with extra("delfast.experiments.networks"):
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

MIN_CNN_IMAGE = 8  # pixels; two poolings leave a map of 2 x 2, so that BatchNorm can train on a single example
MAX_SMALL_IMAGE = 64  # pixels; up to this size a ResNet has the CIFAR stem: 3x3 convolution of stride 1, no pooling
TORCHVISION_WIDTH = 64  # channels of torchvision's first stage


class ImageResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet for any number of input channels, any width of the first stage, and small images.

    The initialization is torchvision's: Kaiming's normal with ``fan_out`` for every convolution (He et al., ICCV 2015,
    equation 14), torch's default for the linear layer.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        width: int = TORCHVISION_WIDTH,
    ) -> None:
        self.width = width  # before super(), which calls _make_layer
        super().__init__(block, layers)
        if image_size <= MAX_SMALL_IMAGE:
            self.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == TORCHVISION_WIDTH:  # the first stage: super().__init__ has just set torchvision's own width
            self.inplanes = self.width
        stage = super()._make_layer(block, planes * self.width // TORCHVISION_WIDTH, *args, **options)
        return cast(nn.Sequential, stage)


class SmallCNN(nn.Sequential):
    """Three convolutions with BatchNorm, of 32, 64 and 128 channels, for experiments of minutes on a CPU."""

    def __init__(self, *, num_classes: int, channels: int, image_size: int) -> None:
        layers: dict[str, nn.Module] = {}
        widths = (channels, 32, 64, 128)
        for number, (before, width) in enumerate(pairwise(widths), 1):
            layers[f"conv{number}"] = nn.Conv2d(before, width, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU(inplace=True)
            layers[f"pool{number}"] = nn.MaxPool2d(2) if number < len(widths) - 1 else nn.AdaptiveAvgPool2d(1)
        super().__init__(OrderedDict(**layers, flatten=nn.Flatten(), fc=nn.Linear(widths[-1], num_classes)))


def _vit_class() -> type[nn.Module]:
    with extra("the network 'vit'"):
        from vit_pytorch.vit_for_small_dataset import ViT
    return cast("type[nn.Module]", ViT)


def _vit(*, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """The DEL paper's ViT. Its patch is 8 for images of 32 pixels, and a quarter of the side for others."""
    return _vit_class()(
        image_size=image_size,
        patch_size=image_size // 4,
        num_classes=num_classes,
        dim=512,
        depth=4,
        heads=8,
        mlp_dim=1536,
        channels=channels,
    )


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ImageResNet, BasicBlock, [2, 2, 2, 2]),
    "resnet18-thin": partial(ImageResNet, BasicBlock, [2, 2, 2, 2], width=16),
    "resnet50": partial(ImageResNet, Bottleneck, [3, 4, 6, 3]),
    "vit": _vit,
    "cnn": SmallCNN,
}
NAMES = tuple(_BUILDERS)


def check_model(name: str, image_size: int | None = None) -> None:
    """Raise InputError for an unknown network or an unfit image size, ImportError if its package is missing."""
    if name not in _BUILDERS:
        raise InputError(f"expected a model {', '.join(NAMES)}, got '{name}'")
    if name == "vit":
        _vit_class()  # raises where vit-pytorch is not installed
    if name == "vit" and image_size is not None and image_size % 4:
        raise InputError(f"a vit takes images whose side is a multiple of 4 pixels, got {image_size}")
    if name == "cnn" and image_size is not None and image_size < MIN_CNN_IMAGE:
        raise InputError(f"a cnn takes images of at least {MIN_CNN_IMAGE} pixels, got {image_size}")


def build(name: str, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Return a newly initialized network: (B, channels, image_size, image_size) float32 -> (B, num_classes) logits.

    Names: ``resnet18``, ``resnet18-thin`` (a quarter of the width: 16, 32, 64, 128), ``resnet50``, ``vit``, ``cnn``
    (three convolutions).
    Raises InputError for another name or an unfit image size.
    """
    check_model(name, image_size)
    return _BUILDERS[name](num_classes=num_classes, channels=channels, image_size=image_size)


def factory(name: str, num_classes: int, channels: int, image_size: int) -> Callable[[], nn.Module]:
    """Return a function that builds a newly initialized network: ``init`` of ``reset_`` and ``unlearn``."""
    check_model(name, image_size)
    return partial(build, name, num_classes, channels, image_size)
