"""Batches on a GPU: the loaders' own to the bit, without waiting, inside CUDA graphs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from delfast.batches import Indexed, map_tensors, move, plain
from delfast.experiments.datasets import Batches, Examples
from delfast.feeding import feed
from tests.conftest import seed_all

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]


class Augmented(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(t + 1 for t in super().__getitem__(index))


def a_job(count: int) -> list[tuple[Iterable[Any], bool]]:
    """Return loaders of a set of images, and whether they are read by index."""
    images, targets = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10
    data = TensorDataset(images, targets)
    ours = Batches(images, targets, torch.rand(3), torch.rand(3) + 0.5, batch_size=128, shuffle=True)
    return [
        (DataLoader(data, batch_size=128, shuffle=True), True),
        (DataLoader(Subset(data, range(0, count, 3)), batch_size=100), True),
        (DataLoader(Subset(Examples(ours), range(0, count, 5)), batch_size=100), True),
        (ours, True),
        (DataLoader(Augmented(images, targets), batch_size=128, shuffle=True, num_workers=1), False),
        ([(images[n : n + 64], targets[n : n + 64]) for n in range(0, count, 64)], False),
    ]


def test_batches_are_the_loaders() -> None:
    """To the bit, while kernels that were launched before still run, and with memory that is used again at once."""
    device = torch.device("cuda", torch.cuda.current_device())
    for loader, by_index in a_job(1000):
        seed_all()
        expected = [list(batch) for batch in loader]
        fed = feed(loader, device)
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            seed_all()
            with torch.cuda.stream(stream):
                found: list[list[Tensor]] = []
                for batch in fed:
                    assert isinstance(batch, Indexed) is by_index
                    torch.cuda._sleep(1_000_000)
                    found.append([part.clone() for part in move(batch, device)])
                    del batch
                assert len(found) == len(expected)
                for parts, others in zip(found, expected, strict=True):
                    for part, other in zip(parts, others, strict=True):
                        assert part.dtype == other.dtype and torch.equal(part.cpu(), other)


def test_the_host_does_not_wait() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for loader, _ in a_job(1000):
        fed = feed(loader, device)
        list(fed)  # the examples are copied
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in fed:
                move(batch, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_holds_the_reading() -> None:
    """The graph's input is the rows alone; changed examples are seen by its next replay."""
    images, targets = torch.randint(0, 256, (512, 3, 8, 8), dtype=torch.uint8), torch.arange(512)
    loader = DataLoader(TensorDataset(images, targets), batch_size=128)
    fed = feed(loader, torch.device("cuda", torch.cuda.current_device()))
    static: Any = None
    for _ in range(2):
        for batch, expected in zip(fed, loader, strict=True):
            if static is None:
                static, graph = map_tensors(batch, Tensor.clone), torch.cuda.CUDAGraph()
                plain(static)  # a run before the capture
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    found = plain(static)
            assert batch.source is static.source
            static.rows.copy_(batch.rows)
            graph.replay()
            assert all(torch.equal(part.cpu(), other) for part, other in zip(found, expected, strict=True))
        images.add_(1)


def test_memory_is_bounded() -> None:
    """A host far ahead of the device does not fill the memory with copies."""
    device = torch.device("cuda", torch.cuda.current_device())
    size = 8 * 2**20
    loader = [(torch.zeros(size // 4),) for _ in range(3)] * 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for batch in feed(loader, device):
        torch.cuda._sleep(10_000_000)
        batch[0].add_(1)
        del batch
    assert torch.cuda.max_memory_allocated() - before <= 6 * size
