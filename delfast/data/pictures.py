"""Image files of any size, from a folder or the Hugging Face hub, decoded once to square RGB bytes."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.files import make_output_dir, one_line, write_atomically

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

IN_MEMORY = 4 * 2**30  # bytes; what takes more is decoded into a file once, and mapped from there
TEST_SPLITS = ("test", "validation")  # of a data set on the hub; clane9/imagenet-100 has the second


@dataclass(frozen=True)
class Pictures:
    """A split that is still encoded. ``open(i)``: picture i, with ``name(i)`` for messages; ``targets``: (N,) int64.
    ``identity``: text that differs where the pictures do.
    """

    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    targets: Tensor
    identity: str


def check(spec: str, image_size: int | None) -> None:
    """InputError if there are no such pictures, as far as that can be told without reading them."""
    if image_size is not None and image_size < 1:
        raise InputError(f"expected an image size of at least 1 pixel, got {image_size}")
    if not spec.startswith("folder:"):
        return
    for part in ("train", "test"):
        folder = _path(spec) / part
        if not folder.is_dir():
            raise InputError(f"expected images in '{folder}/CLASS/', there is no such folder; check --data")


def read(spec: str, cache: Path, image_size: int | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Training and test pairs of (N, 3, S, S) uint8 images and (N,) int64 targets, and the number of classes."""
    kind = next(kind for kind in SOURCES if spec.startswith(kind))
    train, test, num_classes = SOURCES[kind](spec)
    size = image_size or _size_of_first(train)
    mapped = (len(train.targets) + len(test.targets)) * 3 * size * size > IN_MEMORY
    decoded = [(_decode(part, size, cache / "images" if mapped else None), part.targets) for part in (train, test)]
    return decoded[0], decoded[1], num_classes


def _decode(pictures: Pictures, size: int, directory: Path | None) -> Tensor:
    """(N, 3, S, S) uint8, in memory or in a file of the directory; that is filled once, and anew for other pictures."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    shape = (len(pictures.targets), 3, size, size)

    def fill(images: Tensor) -> None:
        for position in range(shape[0]):
            fitted = ImageOps.fit(_open(pictures, position), (size, size), Resampling.BILINEAR)
            images[position] = torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)

    if directory is None:
        images = torch.empty(shape, dtype=torch.uint8)
        fill(images)
        return images
    digest = hashlib.sha256(f"{shape} {pictures.identity}".encode()).hexdigest()
    file, count = make_output_dir(directory) / f"{digest[:20]}.uint8", math.prod(shape)
    if not file.is_file():
        log.info("decoding %d images into '%s' (%.1f GiB)", shape[0], file, count / 2**30)

        def write(partial: Path) -> None:
            _reserve(partial, count)
            fill(torch.from_file(str(partial), shared=True, size=count, dtype=torch.uint8).view(shape))

        write_atomically(file, write)
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.uint8).view(shape)


def _reserve(path: Path, count: int) -> None:
    """Take ``count`` bytes of the disk for a file: without them, writing to it where it is mapped ends in SIGBUS."""
    with open(path, "wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, count)


def _open(pictures: Pictures, position: int) -> Image.Image:
    try:
        with pictures.open(position) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except OSError as error:  # PIL.UnidentifiedImageError is one
        name = pictures.name(position)
        raise InputError(f"cannot read the image '{name}' ({one_line(error)}); remove or replace it") from None


def _size_of_first(pictures: Pictures) -> int:
    width, height = _open(pictures, 0).size
    if width != height:
        name = pictures.name(0)
        raise InputError(f"the first image, '{name}', is {width}x{height}, not square; pass --image-size")
    return int(width)


def _path(spec: str) -> Path:
    return Path(spec.removeprefix("folder:")).expanduser()


def _folder(spec: str) -> tuple[Pictures, Pictures, int]:
    from PIL import Image
    from torchvision.datasets import ImageFolder

    root = _path(spec)
    try:
        parts = [ImageFolder(str(root / part)) for part in ("train", "test")]
    except FileNotFoundError as error:
        raise InputError(f"expected '{root}' to hold train/CLASS/ and test/CLASS/ images: {one_line(error)}") from None
    train, test = parts
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise InputError(f"expected the same classes in '{root}/train' and '{root}/test', '{odd}' is in one alone")

    def pictures(samples: list[tuple[str, int]]) -> Pictures:
        statuses = [os.stat(path) for path, _ in samples]
        identity = "\n".join(
            f"{path} {target} {status.st_size} {status.st_mtime_ns}"
            for (path, target), status in zip(samples, statuses, strict=True)
        )
        targets = torch.tensor([target for _, target in samples])
        return Pictures(lambda i: Image.open(samples[i][0]), lambda i: samples[i][0], targets, identity)

    return pictures(train.samples), pictures(test.samples), len(train.classes)


def _hub(spec: str) -> tuple[Pictures, Pictures, int]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"data '{spec}' needs Hugging Face's datasets ({error}); pip install 'delfast[hub]'") from None
    name = spec.removeprefix("hub:")
    try:
        found = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"the data set '{name}' cannot be had ({one_line(error)}); check its name") from None

    def labelled(split: str) -> bool:
        """Some test splits hide their labels as -1."""
        features = found[split].features
        kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
        if not all(isinstance(features.get(column), kind) for column, kind in kinds.items()):
            raise InputError(f"expected '{name}' to have the columns image and label, got {', '.join(features)}")
        return min(found[split]["label"], default=0) >= 0

    def pictures(split: str) -> Pictures:
        rows: Any = found[split]
        return Pictures(
            lambda i: rows[i]["image"],
            lambda i: f"{name}, {split}, {i}",
            torch.tensor(rows["label"][:], dtype=torch.int64),
            rows._fingerprint,
        )

    named = [split for split in TEST_SPLITS if split in found and labelled(split)]
    if "train" not in found or not labelled("train") or not named:
        have = ", ".join(found)
        raise InputError(f"expected '{name}' to have the splits train and test or validation, labelled, got {have}")
    return pictures("train"), pictures(named[0]), found["train"].features["label"].num_classes


SOURCES: dict[str, Callable[[str], tuple[Pictures, Pictures, int]]] = {"folder:": _folder, "hub:": _hub}
