"""Batches in an order that depends only on the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from delfast.errors import InputError

T = TypeVar("T")


class Batches:
    """Re-iterable batches ``(index, input, target)`` of images in memory. Every example occurs once; none is dropped.

    ``index`` (B,) int64 are positions in ``images``, ``input`` (B, C, H, W) float32 is (image / 255 - mean) / std,
    ``target`` (B,) int64. With ``shuffle`` the order is a function of (seed, epoch) only, so a job that resumes at
    epoch e by ``set_epoch(e)`` reads the same batches.

    images: (N, C, H, W) uint8; targets: (N,) int64; mean, std: (C,) float32, of the images divided by 255;
    indices: the positions to iterate over (default: all). ``input`` and ``target`` are on the device of ``images`` (see
    ``resident``), ``index`` is on the CPU. ahead: read the next batch in a thread while the current batch is in use.
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
        self.images, self.targets, self.ahead = images, targets.to(images.device), ahead
        self.indices = torch.arange(len(images)) if indices is None else indices
        self.batch_size, self.shuffle, self.seed, self.epoch = batch_size, shuffle, seed, 0
        self._mean, self._std = (values.view(-1, 1, 1).to(images.device) for values in (mean, std))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass has; without ``shuffle`` this has no effect."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self._order()
        batches = (self.read(order[begin : begin + self.batch_size]) for begin in range(0, len(order), self.batch_size))
        return one_ahead(batches) if self.ahead else batches

    def read(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read one batch, of these positions in ``images``."""
        where = index.to(self.images.device)
        return index, (self.images[where].to(torch.float32) / 255 - self._mean) / self._std, self.targets[where]

    def _order(self) -> Tensor:
        if not self.shuffle:
            return self.indices
        # SeedSequence mixes the pair, so that (seed, epoch + 1) and (seed + 1, epoch) give unrelated orders
        mixed = int(numpy.random.SeedSequence((self.seed, self.epoch)).generate_state(1, numpy.uint64)[0])
        generator = torch.Generator().manual_seed(mixed)
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


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
    if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
        return images
    return images.to(device)


class Examples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The examples of ``Batches`` one by one: ``(index, input, target)``, without the batch's dimension."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Read several examples at once, as a DataLoader does where it can: one transfer and conversion for all."""
        return list(zip(*self.batches.read(self.batches.indices[positions]), strict=True))
