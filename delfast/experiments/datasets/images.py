"""Image classification data sets, held in memory as bytes."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from delfast.errors import InputError, one_line
from delfast.experiments.datasets import pictures
from delfast.experiments.datasets.batches import resident
from delfast.extras import extra
from delfast.provenance import digest_state

Split = Literal["train", "test"]
DEFAULT_DATA_DIR = Path("~/.cache/delfast")
DIGITS_TEST_SHARE, DIGITS_SPLIT_SEED = 0.2, 0  # the same split for every --seed
SUBSET_SEED = 0  # and the same subset


@dataclass(frozen=True)
class ImageData:
    """A training set and a test set of square images.

    train_images, test_images: (N, C, S, S) uint8.
    train_targets, test_targets: (N,) int64 in [0, num_classes).
    mean, std: (C,) float32, of the training images divided by 255.
    """

    name: str
    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    _placed: dict[tuple[Split, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def images(self, split: Split, device: torch.device) -> Tensor:
        """The images of a set, on ``device`` if they fit there: see ``resident``.

        They stay there as long as this object exists, so that all runs on the data share them.
        """
        images = self.train_images if split == "train" else self.test_images
        placed = self._placed.get((split, device))
        if placed is None:
            placed = resident(images, device)
            if placed is not images:  # else they may fit another time
                self._placed[split, device] = placed
        return placed

    @property
    def channels(self) -> int:
        """Colour channels: 1 or 3."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.train_images.shape[2]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all images and targets."""
        return digest_state(
            {
                "train_images": self.train_images,
                "train_targets": self.train_targets,
                "test_images": self.test_images,
                "test_targets": self.test_targets,
            }
        )


def check_source(spec: str, image_size: int | None = None, is_read: bool = True) -> None:
    """Raise InputError if ``spec`` names no data, or an image size is given where the data has its own.

    ``is_read``: False for data that need not be there.
    """
    if spec.startswith(tuple(pictures.SOURCES)):
        pictures.check(spec, image_size, is_read)
    elif spec not in _SOURCES:
        raise InputError(f"expected data {', '.join(_SOURCES)}, folder:PATH or hub:NAME, got '{spec}'")
    elif image_size is not None:
        raise InputError(
            f"an image size applies to folder:PATH and hub:NAME alone, '{spec}' has its own; leave --image-size out"
        )


def load(
    spec: str,
    data_dir: Path | None = None,
    image_size: int | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> ImageData:
    """Load ``digits | fashion-mnist | cifar10 | cifar100 | svhn | folder:PATH | hub:NAME``.

    ``digits`` comes with scikit-learn (8x8, its 0..16 scaled to 0..255; a fixed stratified split keeps 80 %
    for training). The next four are torchvision's: read from ``data_dir`` (default ~/.cache/delfast),
    downloaded there if absent; for Fashion-MNIST ``data_dir`` may also hold the four ``*-ubyte.gz`` files.
    ``folder:PATH`` reads the images below ``PATH/train/CLASS`` and ``PATH/test/CLASS``; files and folders whose names
    begin with a dot are left out, links to folders are followed. ``hub:NAME`` reads a data set of the Hugging Face
    hub (``hub:clane9/imagenet-100``; a local directory too) by the columns ``image`` and ``label`` of its splits
    ``train`` and ``test`` or ``validation``; both as RGB, scaled and cropped to ``image_size`` (default: that of the
    first image). The decoded images are kept in ``data_dir``: up to 4 GiB in all, of the sets that were used last, and
    as a file that is mapped where one set takes more. ``train_examples`` and ``test_examples`` are those of ``subset``;
    of a folder or the hub's data, only what they choose is decoded again. Raises InputError if the data cannot be had.
    """
    check_source(spec, image_size)
    root = Path(os.path.expanduser(data_dir or DEFAULT_DATA_DIR))
    if spec in _SOURCES:
        return subset(_SOURCES[spec](root), train_examples, test_examples)
    train, test, num_classes = pictures.find(spec)
    chosen = (
        _draw(spec, "train_examples", len(train.targets), train_examples),
        _draw(spec, "test_examples", len(test.targets), test_examples),
    )
    train_images, test_images, levels = pictures.decode(train, test, chosen, root, image_size)
    train_targets, test_targets = train.only(chosen[0]).targets, test.only(chosen[1]).targets
    return ImageData(spec, train_images, train_targets, test_images, test_targets, num_classes, *_statistics(levels))


def subset(data: ImageData, train: int | None, test: int | None) -> ImageData:
    """The data with only that many training and test images, drawn by a seed of its own; None: all of them.

    ``mean`` and ``std`` stay those of the whole training set. InputError for more than there are.
    """
    kept: dict[str, Any] = {}
    for name, count in (("train", train), ("test", test)):
        images, targets = getattr(data, f"{name}_images"), getattr(data, f"{name}_targets")
        chosen = _draw(data.name, f"{name}_examples", len(targets), count)
        if chosen is not None:
            kept |= {f"{name}_images": images[chosen], f"{name}_targets": targets[chosen]}
    return replace(data, **kept)


def _draw(data: str, name: str, total: int, count: int | None) -> Tensor | None:
    """Draw ``count`` of ``total`` positions, sorted; None for all of them. InputError for more than there are."""
    if count is None:
        return None
    if count > total:
        raise InputError(f"expected at most {total} {name} of '{data}', got {count}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SUBSET_SEED))
    return order[:count].sort().values


def _assemble(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int) -> ImageData:
    return ImageData(name, *train, *test, num_classes, *_statistics(pictures.count_levels(train[0])))


def _statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of images / 255, from their (C, 256) levels: exact in any order."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # a constant channel would divide by zero; one grey level is then the unit
    return mean.float(), variance.sqrt().clamp_min(1 / 255).float()


def _load_digits(_: Path) -> ImageData:
    with extra("data set 'digits'"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    targets = torch.from_numpy(digits.target).to(torch.int64)
    train, test = train_test_split(
        numpy.arange(len(targets)),
        test_size=DIGITS_TEST_SHARE,
        stratify=digits.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    return _assemble("digits", (images[train], targets[train]), (images[test], targets[test]), 10)


def _load_fashion_mnist(root: Path) -> ImageData:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if all((root / name).is_file() for name in names):
        train_images, train_targets, test_images, test_targets = (_read_idx(root / name) for name in names)
    else:
        train, test = _torchvision("FashionMNIST", root, "FashionMNIST/raw", {"train": True}, {"train": False})
        train_images, train_targets = train.data, train.targets
        test_images, test_targets = test.data, test.targets
    return _assemble(
        "fashion-mnist",
        (train_images[:, None], train_targets.to(torch.int64)),
        (test_images[:, None], test_targets.to(torch.int64)),
        10,
    )


def _read_idx(path: Path) -> Tensor:
    """A gzipped IDX file of bytes (http://yann.lecun.com/exdb/mnist: 0, 0, 8, ndim, big-endian sizes,
    values).
    """
    try:
        content = gzip.decompress(path.read_bytes())
        ndim = content[3]
        shape = numpy.frombuffer(content, ">i4", ndim, offset=4)
        values = numpy.frombuffer(content, numpy.uint8, offset=4 + 4 * ndim)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin with 0, 0, 8")
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"'{path}' is no gzipped IDX file of bytes ({one_line(error)}); fetch it again") from None


def _load_cifar10(root: Path) -> ImageData:
    return _load_cifar("cifar10", "CIFAR10", root, "cifar-10-batches-py", 10)


def _load_cifar100(root: Path) -> ImageData:
    return _load_cifar("cifar100", "CIFAR100", root, "cifar-100-python", 100)


def _load_cifar(name: str, dataset: str, root: Path, where: str, num_classes: int) -> ImageData:
    train, test = _torchvision(dataset, root, where, {"train": True}, {"train": False})
    pairs = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return _assemble(name, pairs[0], pairs[1], num_classes)


def _load_svhn(root: Path) -> ImageData:
    train, test = _torchvision("SVHN", root, "train_32x32.mat, test_32x32.mat", {"split": "train"}, {"split": "test"})
    pairs = [(torch.from_numpy(part.data), torch.from_numpy(part.labels).to(torch.int64)) for part in (train, test)]
    return _assemble("svhn", pairs[0], pairs[1], 10)


def _torchvision(dataset: str, root: Path, where: str, *parts: dict[str, Any]) -> list[Any]:
    """torchvision's data set, one object a part; downloaded into ``root`` if it is not there."""
    with extra(f"data set {dataset}"):
        from torchvision import datasets

    try:
        return [getattr(datasets, dataset)(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a damaged archive a RuntimeError
        raise InputError(
            f"{dataset} is neither at '{root}' ({where}) nor could it be downloaded ({one_line(error)}); "
            "put it there or pass --data-dir"
        ) from None


_SOURCES: dict[str, Callable[[Path], ImageData]] = {
    "digits": _load_digits,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
    "cifar100": _load_cifar100,
    "svhn": _load_svhn,
}
