"""Copies ahead of their use, on fake streams that run their operations at any moment that their events allow."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from delfast.feeding import MAX_LEAD, CopyStream, feed

CUDA = torch.device("cuda", 0)
to = Tensor.to


class Event:
    """The end of the operations that a stream has so far."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.end = stream, stream.given

    def synchronize(self) -> None:
        while self.stream.done < self.end:
            self.stream.step()


class Stream:
    """Operations that run in order, each when ``step`` is called."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.done = 0

    @property
    def given(self) -> int:
        return len(self.operations)

    def step(self) -> None:
        if self.done < self.given:
            self.operations[self.done]()
            self.done += 1

    def record_event(self) -> Event:
        return Event(self)

    def wait_stream(self, other: Stream) -> None:
        self.operations.append(Event(other).synchronize)


class FakeCuda:
    """A device: memory that is used again once it is free, copies from pinned memory, and kernels that read later."""

    def __init__(self, patch: pytest.MonkeyPatch, schedule: random.Random) -> None:
        self.schedule, self.consumer = schedule, Stream()
        self.current, self.copies = self.consumer, list[Stream]()
        self.pinned: set[int] = set()
        self.blocks: list[Tensor] = []  # all memory that was ever allocated
        self.free: list[tuple[Tensor, Event | None]] = []
        self.users: dict[int, Stream] = {}
        patch.setattr(torch.cuda, "Stream", self._new_stream)
        patch.setattr(torch.cuda, "stream", self._use)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(Tensor, "pin_memory", lambda t: self._pin(t))
        patch.setattr(Tensor, "to", lambda t, *args, **options: self._to(t, *args, **options))
        patch.setattr(Tensor, "record_stream", lambda t, stream: self.users.__setitem__(t.data_ptr(), stream))

    def _new_stream(self, device: torch.device) -> Stream:
        self.copies.append(Stream())
        return self.copies[-1]

    @contextmanager
    def _use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _pin(self, tensor: Tensor) -> Tensor:
        found = tensor.clone()
        self.pinned.add(id(found))
        weakref.finalize(found, self.pinned.discard, id(found))
        return found

    def _to(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if not args or args[0] != CUDA:
            return to(tensor, *args, **options)
        if id(tensor) not in self.pinned and options.get("non_blocking"):
            return tensor  # already there
        block = self._allocate(tensor)
        self.current.operations.append(lambda: block.copy_(tensor))
        found = block.view_as(block)
        weakref.finalize(found, self._release, block)
        return found

    def _allocate(self, tensor: Tensor) -> Tensor:
        for number, (block, event) in enumerate(self.free):
            ended = event is None or event.stream.done >= event.end
            if ended and block.shape == tensor.shape and block.dtype == tensor.dtype:
                return self.free.pop(number)[0]
        self.blocks.append(torch.full_like(tensor, -1))
        return self.blocks[-1]

    def _release(self, block: Tensor) -> None:
        """Free a deleted tensor's memory: at once, or when the stream that it was recorded on has come so far."""
        user = self.users.pop(block.data_ptr(), None)
        self.free.append((block, None if user is None else user.record_event()))

    def read(self, tensor: Tensor, results: list[Any]) -> None:
        """Launch a kernel that reads the tensor's memory when it runs."""
        block = next(block for block in self.blocks if block.data_ptr() == tensor.data_ptr())
        self.consumer.operations.append(lambda: results.append(block.tolist()))

    def run_some(self) -> None:
        """Run some operations; the host may be far ahead of the device."""
        for stream in (self.consumer, *self.copies):
            for _ in range(self.schedule.randrange(3)):
                stream.step()


@settings(max_examples=60)
@given(st.lists(st.integers(1, 3), max_size=12), st.integers(0, 99))
def test_kernels_read_each_batch_as_it_is_whenever_the_device_runs(sizes: list[int], seed: int) -> None:
    batches = [
        {"x": torch.full((size,), number), "y": [torch.full((2,), -number)]} for number, size in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch, random.Random(seed))
        found: list[Any] = []
        for batch in CopyStream(CUDA).batches(batches):
            cuda.read(batch["x"], found)
            cuda.read(batch["y"][0], found)
            del batch
            cuda.run_some()
        Event(cuda.consumer).synchronize()
    assert found == [part for batch in batches for part in (batch["x"].tolist(), batch["y"][0].tolist())]


def test_the_host_is_two_batches_ahead_and_no_more() -> None:
    """Without a limit the copies of a fast host would fill the memory of a slow device."""
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch, random.Random(0))
        found: list[Any] = []
        for number, (x,) in enumerate(CopyStream(CUDA).batches([[torch.full((2,), n)] for n in range(40)])):
            cuda.read(x, found)
            del x
            assert len(found) == max(0, number - MAX_LEAD)  # the device runs only what the host waits for
        assert len(cuda.blocks) <= MAX_LEAD + 2


def test_a_held_batch_keeps_its_values() -> None:
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch, random.Random(0))
        held = list(CopyStream(CUDA).batches([torch.full((2,), n) for n in range(9)]))
        found: list[Any] = []
        for x in held:
            cuda.read(x, found)
        Event(cuda.consumer).synchronize()
    assert found == [[n, n] for n in range(9)]


def test_the_fake_device_finds_a_missing_wait_and_a_missing_record() -> None:
    """The test's own device: each rule that a copy stream has to keep is needed."""

    def read_all(broken: str) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            cuda = FakeCuda(patch, random.Random(1))
            if broken == "record":
                patch.setattr(Tensor, "record_stream", lambda *_: None)
            if broken == "wait":
                patch.setattr(Stream, "wait_stream", lambda *_: None)
            found: list[Any] = []
            for x in CopyStream(CUDA).batches([torch.full((2,), n) for n in range(9)]):
                cuda.read(x, found)
                del x
                if broken == "record":
                    for stream in cuda.copies:
                        stream.step()
            Event(cuda.consumer).synchronize()
        return found

    expected = [[n, n] for n in range(9)]
    assert read_all("nothing") == expected
    assert read_all("record") != expected and read_all("wait") != expected


def test_other_values_are_returned_as_they_are() -> None:
    class Mine(Tensor):
        pass

    batch = (
        "text",
        torch.zeros(2, requires_grad=True),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2).as_subclass(Mine),
        nn.Parameter(torch.zeros(2)),
    )
    with pytest.MonkeyPatch.context() as patch:
        FakeCuda(patch, random.Random(0))
        copied = CopyStream(CUDA).copy(batch)
    assert all(new is old for new, old in zip(copied, batch, strict=True))


def test_a_loader_is_read_when_its_batch_is_asked_for() -> None:
    """Not ahead of that: generators that the consumer draws from too are drawn from in the same order."""

    class Failing:
        def __init__(self) -> None:
            self.read, self.closed = 0, 0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            try:
                for self.read in (1, 2):
                    yield torch.full((2,), self.read)
                raise OSError("the disk is gone")
            finally:
                self.closed += 1

    loader = Failing()
    with pytest.MonkeyPatch.context() as patch:
        FakeCuda(patch, random.Random(0))
        fed = feed(loader, CUDA, resident=False)
        assert len(fed) == 3  # type: ignore[arg-type]
        passing = iter(fed)
        for number in (1, 2):
            next(passing)
            assert loader.read == number
        with pytest.raises(OSError, match="disk is gone"):
            next(passing)
        for _ in fed:
            break
        del passing
        gc.collect()
        assert loader.closed == 2  # an iteration that was left early has ended


def test_draws_are_those_of_the_loader() -> None:
    def run(wrap: Callable[[Any], Any]) -> list[float]:
        torch.manual_seed(0)
        data = TensorDataset(torch.arange(6), torch.arange(6))
        loaders = [wrap(DataLoader(data, batch_size=2, shuffle=True)) for _ in range(2)]
        found = []
        for _ in range(2):
            passes = [iter(loader) for loader in loaders]  # their beginnings draw too, in this order
            for pair in zip(*reversed(passes), strict=True):
                found += [float(torch.rand(())), *(int(v) for x, _ in pair for v in x)]
        return found

    expected = run(lambda loader: loader)
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch, random.Random(0))
        patch.setattr(cuda.consumer, "wait_stream", lambda other: Event(other).synchronize())
        assert run(lambda loader: feed(loader, CUDA, resident=False)) == expected
