"""Image files of any size, from a folder or the Hugging Face hub, decoded once to square RGB bytes."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.extras import extra
from delfast.files import make_output_dir, one_line, reason, write_atomically

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
    digest = hashlib.sha256(f"{shape} {pictures.identity}".encode(errors="surrogateescape")).hexdigest()
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
    except Exception as error:  # PIL raises many kinds for damaged files, and one of its own for decompression bombs
        name = pictures.name(position)
        raise InputError(f"cannot read the image '{name}' ({one_line(error)}); remove or replace it") from None


def _size_of_first(pictures: Pictures) -> int:
    width, height = _open(pictures, 0).size
    if width != height:
        name = pictures.name(0)
        raise InputError(f"the first image, '{name}', is {width}x{height}, not square; pass --image-size")
    return int(width)


def _path(spec: str) -> Path:
    return Path(os.path.expanduser(spec.removeprefix("folder:")))  # which leaves users that are not there


def _folder(spec: str) -> tuple[Pictures, Pictures, int]:
    root = _path(spec)
    classes = {part: _subfolders(root / part) for part in ("train", "test")}
    if classes["train"] != classes["test"]:
        odd = sorted(set(classes["train"]) ^ set(classes["test"]))[0]
        raise InputError(f"expected the same classes in '{root}/train' and '{root}/test', '{odd}' is in one alone")
    train, test = (_files_of_classes(root / part, names) for part, names in classes.items())
    return train, test, len(classes["train"])


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    found = sorted(os.path.basename(path) for path, is_folder in _entries(str(folder)) if is_folder)
    if not found:
        raise InputError(f"expected '{folder}' to hold CLASS/ folders of images, it has none; check --data")
    return found


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """Paths in a folder, and whether they are folders, except names that begin with a dot (``.ipynb_checkpoints``).
    InputError if one cannot be read, such as a link that leads to itself.
    """
    try:
        with os.scandir(folder) as entries:
            yield from [(entry.path, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read '{error.filename or folder}' ({reason(error)}); remove or replace it") from None


def _files_of_classes(folder: Path, classes: Sequence[str]) -> Pictures:
    with extra("a data set of image files"):
        from PIL import Image

    paths: list[str] = []
    targets: list[int] = []
    identity: list[str] = []
    for target, name in enumerate(classes):
        found = _image_files(folder / name)
        for path, status in found:
            paths.append(path)
            targets.append(target)
            identity.append(f"{path} {target} {status.st_size} {status.st_mtime_ns}")
    return Pictures(lambda i: Image.open(paths[i]), lambda i: paths[i], torch.tensor(targets), "\n".join(identity))


def _image_files(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Image files below a folder, by their extension, in the order of torchvision's ImageFolder.

    InputError for a link to a folder that is read already (its images would count twice, or without end), for what is
    no regular file (a pipe would wait for its other end), and where there are no images.
    """
    with extra("a data set of image files"):
        from torchvision.datasets.folder import IMG_EXTENSIONS

    places, images = [str(folder)], []
    read: dict[tuple[int, int], str] = {}
    while places:
        place = places.pop()
        status = os.stat(place)
        first = read.setdefault((status.st_dev, status.st_ino), place)
        if first != place:
            raise InputError(f"'{place}' leads to '{first}', which is read already; remove the link")
        for path, is_folder in _entries(place):
            if is_folder:
                places.append(path)
            elif path.lower().endswith(IMG_EXTENSIONS):
                images.append(path)
    if not images:
        raise InputError(f"expected images in '{folder}', there is none ({' '.join(IMG_EXTENSIONS)}); add some")
    return [(path, _status(path)) for path in sorted(images, key=os.path.split)]


def _status(path: str) -> os.stat_result:
    """The status of an image file. InputError where it is none that can be read without waiting."""
    try:
        status = os.stat(path)
    except OSError as error:  # links to nothing, or to themselves
        raise InputError(f"cannot read the image '{path}' ({reason(error)}); remove or replace it") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"cannot read the image '{path}' (it is no regular file); remove or replace it")
    return status


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
