"""Batches in an order that depends only on the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from delfast.errors import InputError
from delfast.feeding import Columns, InMemory, Ordered, fits

T = TypeVar("T")


class Batches(Ordered):
    """Re-iterable batches ``(index, input, target)`` of images in memory. Every example occurs once; none is dropped.

    ``index`` (B,) int64 are positions in ``images``, on the CPU. ``input`` (B, C, H, W) float32 is
    (image / 255 - mean) / std, ``target`` (B,) int64; both are on the device of ``images`` (see ``resident``).
    With ``shuffle`` the order is a function of (seed, epoch) only, so a job that resumes at epoch e by ``set_epoch(e)``
    reads the same batches. ``delfast.feeding.feed`` reads the batches by index where the images are on its device or
    fit there.

    images: (N, C, H, W) uint8.
    targets: (N,) int64.
    mean, std: (C,) float32, of the images divided by 255.
    indices: the positions to iterate over; all by default.
    ahead: whether the next batch is read in a thread while the current batch is in use.
    """

    draws_globally = False  # iterating draws from no generator of the process

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        batch_size: int,
        indices: Tensor | None = None,
        shuffle: bool = False,
        seed: int = 0,
        ahead: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"expected a batch size of at least 1, got {batch_size}")
        if len(images) != len(targets):
            raise InputError(f"expected one target an image, got {len(images)} images and {len(targets)} targets")
        if indices is not None and len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(images):
            raise InputError(
                f"expected indices in [0, {len(images)}), the positions of the images, got {int(indices.min())} to "
                f"{int(indices.max())}; pass positions that exist"
            )
        self.images, self.targets, self.ahead = images, targets.to(images.device), ahead
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self._scale = tuple(t.to(images.device) for t in (torch.tensor(255.0), mean.view(-1, 1, 1), std.view(-1, 1, 1)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has; without ``shuffle`` this has no effect."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def batch_sizes(self) -> tuple[int, int] | None:
        """Number of examples in the first and in the smallest batch; None without an example."""
        count, rest = len(self.indices), len(self.indices) % self.batch_size
        return (min(count, self.batch_size), rest or min(count, self.batch_size)) if count else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = (self.read(self.indices[positions]) for positions in self.positions())
        return one_ahead(batches) if self.ahead else batches

    def read(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read one batch, of these positions in ``images``."""
        rows = index.to(self.images.device)
        images, targets = self.images.index_select(0, rows), self.targets.index_select(0, rows)
        return index, _normalized(images, *self._scale), targets

    def positions(self) -> tuple[Tensor, ...]:
        order = self._order()
        return tuple(order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size))

    def columns(self, device: torch.device) -> Columns:
        scale = [t.to(device) for t in self._scale]
        return Columns(
            (self._index, self.images, self.targets),
            lambda index, images, targets: (index, _normalized(images, *scale), targets),
        )

    @cached_property
    def _index(self) -> Tensor:
        return torch.arange(len(self.images), device=self.images.device)

    def _order(self) -> Tensor:
        """Return the positions in ``indices`` in the order of the next pass."""
        count = len(self.indices)
        if not self.shuffle:
            return torch.arange(count)
        # SeedSequence mixes the pair, so that (seed, epoch + 1) and (seed + 1, epoch) give unrelated orders
        mixed = int(numpy.random.SeedSequence((self.seed, self.epoch)).generate_state(1, numpy.uint64)[0])
        return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


def _normalized(images: Tensor, levels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images / levels - mean) / std. A number instead of a tensor of levels would be multiplied by its inverse
    on CUDA, which rounds differently.
    """
    return (images.to(torch.float32) / levels - mean) / std


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; read each in a thread while the item before it is in use."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def resident(images: Tensor, device: torch.device) -> Tensor:
    """Move the images to ``device`` if they need at most a quarter of its free memory; else return them as they are.

    They stay bytes; ``Batches`` converts each batch to floats on the device.
    """
    return images.to(device) if device.type == "cuda" and fits(images.nbytes, device) else images


class Examples(InMemory, Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The examples of ``Batches`` one by one: ``(index, input, target)``, without the batch's dimension."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.indices = batches, batches.indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Read several examples at once, as a DataLoader does where it can: one transfer and conversion for all."""
        return list(zip(*self.batches.read(self.indices[positions]), strict=True))

    def columns(self, device: torch.device) -> Columns:
        tensors, form = self.batches.columns(device)
        return Columns(tensors, lambda *parts: [*form(*parts)])  # a list, as torch's collate function returns
