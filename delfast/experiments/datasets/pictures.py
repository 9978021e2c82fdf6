"""Image files of any size, from a folder or the Hugging Face hub, decoded once to square RGB bytes.

Decoded images that fit into memory are kept in an ``ArrayCache`` below the data directory. Its keys cover the files'
paths, sizes and times, the image size, and the decoder.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from delfast.errors import InputError, one_line
from delfast.experiments.datasets.array_cache import ArrayCache
from delfast.extras import extra
from delfast.files import directory_for, make_output_dir, reason, write_atomically

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

IN_MEMORY = 4 * 2**30  # bytes; what takes more is decoded into a file once, and mapped from there
DECODER = 1  # increase it when ``_decode`` gives other pixels: arrays that older versions kept are not used then
SETTLED = 2.0  # seconds; two changes within one step of a file system's clock (FAT: 2 s) leave the same times
TEST_SPLITS = ("test", "validation")  # of a data set on the hub; clane9/imagenet-100 has the second


@dataclass(frozen=True)
class Pictures:
    """A split that is still encoded.

    open: returns picture i.
    name: returns the name of picture i for messages.
    targets: (N,) int64.
    identity: text that differs where the pictures do.
    changed: when one of their files or folders last changed, in ns since the epoch; 0 for pictures that cannot be
        replaced.
    settled: whether ``changed`` was SETTLED seconds ago.
    """

    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    targets: Tensor
    identity: str
    changed: int = 0
    settled: bool = True

    def only(self, positions: Tensor | None) -> Pictures:
        """The pictures at these positions, (n,) int64; None: all of them."""
        if positions is None:
            return self
        chosen = positions.tolist()
        return replace(
            self,
            open=lambda i: self.open(chosen[i]),
            name=lambda i: self.name(chosen[i]),
            targets=self.targets[positions],
            identity=f"{self.identity} {chosen}",
        )


def check(spec: str, image_size: int | None, is_read: bool) -> None:
    """Raise InputError for an image size below 1, and, if the data is read, for folders that do not exist."""
    if image_size is not None and image_size < 1:
        raise InputError(f"expected an image size of at least 1 pixel, got {image_size}")
    if not is_read or not spec.startswith("folder:"):
        return
    for part in ("train", "test"):
        folder = _path(spec) / part
        if not folder.is_dir():
            raise InputError(f"expected images in '{folder}/CLASS/', there is no such folder; check --data")


def find(spec: str) -> tuple[Pictures, Pictures, int]:
    """The training and test pictures, still encoded, and the number of classes. InputError if they cannot be had."""
    kind = next(kind for kind in SOURCES if spec.startswith(kind))
    return SOURCES[kind](spec)


def decode(
    train: Pictures, test: Pictures, chosen: tuple[Tensor | None, Tensor | None], root: Path, image_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the chosen training and test pictures, and count the levels of the whole training set.

    chosen: sorted positions in ``train`` and in ``test``; None: all. root: the data directory. image_size: side in
    pixels; None: that of the first training picture. Returns (n, 3, S, S) uint8 training and test images and the
    (3, 256) int64 levels of ``count_levels``. Where both splits, whole, take more than IN_MEMORY, they are mapped from
    files. Otherwise images and levels are kept under ``root / "decoded"``. Where the levels are kept already, only the
    chosen pictures are decoded.
    """
    size = image_size or _size_of_first(train)
    cache = ArrayCache(root / "decoded")
    if (len(train.targets) + len(test.targets)) * 3 * size * size > IN_MEMORY:
        mapped = [_decode(pictures, size, root / "images") for pictures in (train, test)]
        levels = _kept(train, f"levels {size}", cache, lambda: count_levels(mapped[0]))
        images = [every if part is None else every[part] for every, part in zip(mapped, chosen, strict=True)]
        return images[0], images[1], levels
    train_images, levels = _with_levels(train, chosen[0], size, cache)
    return train_images, _images(test.only(chosen[1]), size, cache), levels


def count_levels(images: Tensor) -> Tensor:
    """Count how many pixels of each channel have each level. (N, C, H, W) uint8 -> (C, 256) int64."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in torch.split(images, 4096):
        counts += torch.stack([torch.bincount(part[:, c].flatten(), minlength=256) for c in range(images.shape[1])])
    return counts


def _with_levels(train: Pictures, chosen: Tensor | None, size: int, cache: ArrayCache) -> tuple[Tensor, Tensor]:
    """The chosen training images and the levels of all, which are decoded for them unless the levels are kept."""
    levels = cache.read(_key(train, f"levels {size}"))
    if levels is not None:
        return _images(train.only(chosen), size, cache), levels
    if chosen is None:
        images = every = _images(train, size, cache)
    else:
        every = _decode(train, size, None)
        images = _kept(train.only(chosen), f"images {size}", cache, lambda: every[chosen])
    return images, _keep(train, f"levels {size}", cache, count_levels(every))


def _images(pictures: Pictures, size: int, cache: ArrayCache) -> Tensor:
    """(N, 3, S, S) uint8, kept or decoded."""
    return _kept(pictures, f"images {size}", cache, lambda: _decode(pictures, size, None))


def _kept(pictures: Pictures, what: str, cache: ArrayCache, compute: Callable[[], Tensor]) -> Tensor:
    """An array that the cache keeps of these pictures; computed, and kept, where there is none."""
    array = cache.read(_key(pictures, what))
    return _keep(pictures, what, cache, compute()) if array is None else array


def _keep(pictures: Pictures, what: str, cache: ArrayCache, array: Tensor) -> Tensor:
    """The array, kept unless the pictures may change once more without a sign of it."""
    if pictures.settled:
        cache.write(_key(pictures, what), array)
    return array


def _key(pictures: Pictures, what: str) -> str:
    import PIL

    text = f"{what} {DECODER} {PIL.__version__} {len(pictures.targets)} {pictures.changed} {pictures.identity}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _decode(pictures: Pictures, size: int, directory: Path | None) -> Tensor:
    """Decode to (N, 3, S, S) uint8: in memory, or in a file of the directory, which is filled once for its pictures."""
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
    if not directory.exists():
        make_output_dir(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
    file, count = make_output_dir(directory) / f"{_key(pictures, f'mapped {size}')[:20]}.uint8", math.prod(shape)

    def mapped(path: Path, shared: bool) -> Tensor:
        return torch.from_file(str(path), shared=shared, size=count, dtype=torch.uint8).view(shape)

    def write(path: Path) -> None:
        log.info("decoding %d images into '%s' (%.1f GiB)", shape[0], file, count / 2**30)
        _reserve(path, count)
        fill(mapped(path, shared=True))

    if not pictures.settled:  # the pictures may change once more without a sign of it: no later run may use the file
        with directory_for(file) as (private, _):
            write(private / file.name)
            return mapped(private / file.name, shared=False)  # the mapping outlives the name
    if not file.is_file():
        write_atomically(file, write)
    return mapped(file, shared=False)


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

    listed, changed = time.time_ns(), _changed(os.stat(folder))
    paths: list[str] = []
    targets: list[int] = []
    identity: list[str] = []
    for target, name in enumerate(classes):
        found, folders = _image_files(folder / name)
        # a file's own times may be older than the file that it replaces, or those of a folder of the same name
        changed = max([changed, *map(_changed, folders), *(_changed(status) for _, status in found)])
        for path, status in found:
            paths.append(path)
            targets.append(target)
            identity.append(f"{path} {target} {status.st_size} {status.st_mtime_ns}")
    return Pictures(
        lambda i: Image.open(paths[i]),
        lambda i: paths[i],
        torch.tensor(targets),
        "\n".join(identity),
        changed,
        changed < listed - SETTLED * 1e9,
    )


def _changed(status: os.stat_result) -> int:
    """Return when a file or its status last changed (ns); only the time of the status cannot be set back."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def _image_files(folder: Path) -> tuple[list[tuple[str, os.stat_result]], list[os.stat_result]]:
    """Image files below a folder, by their extension, in the order of torchvision's ImageFolder, and its folders.

    InputError for a link to a folder that is read already (its images would count twice, or without end), for what is
    no regular file (a pipe would wait for its other end), and where there are no images.
    """
    with extra("a data set of image files"):
        from torchvision.datasets.folder import IMG_EXTENSIONS

    places = [str(folder)]
    images: dict[str, list[str]] = {}
    read: dict[tuple[int, int], str] = {}
    folders = []
    while places:
        place = places.pop()
        status = os.stat(place)
        folders.append(status)
        first = read.setdefault((status.st_dev, status.st_ino), place)
        if first != place:
            raise InputError(f"'{place}' leads to '{first}', which is read already; remove the link")
        for path, is_folder in _entries(place):
            if is_folder:
                places.append(path)
            elif path.lower().endswith(IMG_EXTENSIONS):
                images.setdefault(place, []).append(path)
    if not images:
        raise InputError(f"expected images in '{folder}', there is none ({' '.join(IMG_EXTENSIONS)}); add some")
    return [(path, _status(path)) for place in sorted(images) for path in sorted(images[place])], folders


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
