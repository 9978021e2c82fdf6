"""Batches where a device uses them: read there by index if the examples fit, else copied there while it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from delfast.batches import Indexed, map_tensors
from delfast.errors import InputError

RESIDENT_PART = 4  # examples stay on a device if they need at most a quarter of its free memory
CHUNK_BYTES = 2**28  # of rows selected at a time: the examples may be in a file that the host's memory cannot hold
MAX_LEAD = 2  # batches that the host may be ahead of the device, since a copied batch occupies memory until it is used


def feed(loader: Iterable[Any], device: torch.device, *, resident: bool | None = None) -> Iterable[Any]:
    """Return an iterable of the loader's batches, in the form that is fastest to use on ``device``.

    Batches, their order, the draws from every generator, the moments of these draws, exceptions and the length are
    those of ``loader``. Each pass reads the loader as it is then, so ``set_epoch`` of the loader has its effect.

    On CUDA, with examples that need at most a quarter of the free memory, the batches are ``Indexed``: of delfast's own
    data sets (``InMemory``), and of a DataLoader over a TensorDataset, or a Subset of one, nested or not, with torch's
    collate function and without workers. The examples are copied to the device in the first pass, and again when their
    version counters show a change. A change through numpy or ``.data`` during the life of the iterable is not seen.
    Other batches are copied by ``CopyStream``. For a device other than CUDA the loader itself is returned.

    resident: whether to try ``Indexed`` batches (default: on CUDA).
    """
    on_cuda = device.type == "cuda"
    if isinstance(loader, Feed) or not (on_cuda if resident is None else resident or on_cuda):
        return loader
    return Feed(loader, device, resident=resident is not False)


def fits(byte_count: int, device: torch.device) -> bool:
    """Return whether so many bytes may stay on the device: a CUDA device with four times as much free memory."""
    return device.type != "cuda" or byte_count <= torch.cuda.mem_get_info(device)[0] // RESIDENT_PART


# Examples that are rows of tensors


class Columns(NamedTuple):
    """Tensors that have the examples along dim 0, and the function that makes a batch of selected rows of each."""

    tensors: tuple[Tensor, ...]
    form: Callable[..., Any]


class InMemory(ABC):
    """Base of loaders and data sets whose examples are rows of tensors.

    ``indices``: int64 (N,), the row of each example. A class that inherits ``columns`` is read as any other loader,
    since it may yield other batches.
    """

    indices: Tensor

    @abstractmethod
    def columns(self, device: torch.device) -> Columns:
        """Return the tensors where they are, and a function that makes a batch of rows that are on ``device``."""


class Ordered(InMemory):
    """A loader whose whole order is a function of its state, so that all rows of a pass are copied at once."""

    @abstractmethod
    def positions(self) -> tuple[Tensor, ...]:
        """Return for each batch of the next pass int64 (B,), positions in ``indices``."""


class _Examples(NamedTuple):
    """The examples of a loader: columns, the rows in use, and the positions in ``rows`` of each batch of a pass."""

    columns: Columns
    rows: Tensor
    draw: Callable[[], Iterable[Tensor]]


def _examples(loader: Any, device: torch.device) -> _Examples | None:
    """Return the examples of a loader whose batches are rows of tensors; None for any other loader."""
    if isinstance(loader, Ordered):
        found = _columns(loader, device)
        return None if found is None else _Examples(*found, loader.positions)
    if (
        type(loader) is not DataLoader
        or loader.num_workers
        or loader.batch_sampler is None
        or loader.collate_fn is not default_collate
    ):
        return None
    found = _columns(loader.dataset, device)
    if found is None:
        return None
    # a DataLoader of torch with the same sampler and generator makes the same draws
    draws = DataLoader(
        _Positions(), batch_sampler=loader.batch_sampler, generator=loader.generator, collate_fn=_as_positions
    )
    return _Examples(*found, draws.__iter__)


def _columns(dataset: Any, device: torch.device) -> tuple[Columns, Tensor] | None:
    """Return the columns of a data set and the row of each example; None if its examples are not known to be rows.

    Only exact types are known: a subclass may return other examples, and others in each epoch.
    """
    subsets: list[Any] = []
    while type(dataset) is Subset and "__getitems__" not in vars(dataset):
        subsets.append(dataset.indices)
        dataset = dataset.dataset
    if type(dataset) is TensorDataset and "__getitems__" not in vars(dataset):
        columns, rows = Columns(tuple(dataset.tensors), _as_list), torch.arange(len(dataset), device="cpu")
    elif isinstance(dataset, InMemory) and "columns" in vars(type(dataset)):
        columns, rows = dataset.columns(device), dataset.indices.to("cpu", torch.int64)
    else:
        return None
    for indices in reversed(subsets):
        selected = _selected(rows, indices)
        if selected is None:
            return None
        rows = selected
    return (columns, rows) if _are_plain(columns.tensors) and _are_in_range(rows, columns.tensors) else None


def _selected(rows: Tensor, indices: Any) -> Tensor | None:
    """Return ``rows[indices]`` for the indices of a Subset; None unless they are integers that all are in range."""
    if type(indices) not in (list, tuple, range, numpy.ndarray, Tensor):
        return None  # another sequence may change from one reading to the next
    try:
        index = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    signed = index.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)  # unsigned ones could be flags
    if index.ndim != 1 or not (signed or not len(index)):
        return None
    index = index.to(torch.int64)
    index = torch.where(index < 0, index + len(rows), index)
    return rows[index] if _are_in_range(index, [rows]) else None


def _are_in_range(rows: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether every tensor has these rows. A CUDA device would end the process for one that it has not."""
    return not len(rows) or (int(rows.min()) >= 0 and int(rows.max()) < min(map(len, tensors)))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether rows selected on another device equal the tensors' own, and version counters show changes."""
    return all(
        type(t) is Tensor
        and t.layout is torch.strided
        and not (t.requires_grad or t.is_inference() or t.is_quantized or t.is_conj() or t.is_neg())
        for t in tensors
    )


def _as_list(*parts: Tensor) -> list[Tensor]:
    return list(parts)  # as torch's collate function returns the examples of a TensorDataset


class _Positions(Dataset[Any]):
    """A data set whose examples are their positions."""

    def __getitem__(self, position: Any) -> Any:
        return position

    def __getitems__(self, positions: Any) -> Any:
        return positions


def _as_positions(positions: Any) -> Tensor:
    """Return what a batch sampler yields as int64 (B,)."""
    found = torch.as_tensor(positions, device="cpu")
    if found.ndim != 1 or found.dtype is torch.bool or found.is_floating_point():
        raise InputError(
            f"expected the batch_sampler to yield integers (B,), got {found.dtype} {tuple(found.shape)}; "
            "yield the positions of a batch's examples"
        )
    return found.to(torch.int64)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Columns on a device: the source of ``Indexed`` batches."""

    tensors: tuple[Tensor, ...]
    form: Callable[..., Any]

    def read(self, rows: Tensor) -> Any:
        rows = rows.to(self.tensors[0].device)
        return self.form(*(tensor.index_select(0, rows) for tensor in self.tensors))


class Resident:
    """Examples on a device. They are copied there unless they are there, and again once their tensors were changed.

    source: reads batches. The object stays the same unless the data set gets other tensors or rows, so that a graph
        that reads it stays valid.
    lookup: int64 (N,) on the CPU, the row of the source for each example.
    """

    def __init__(self, columns: Columns, rows: Tensor, device: torch.device) -> None:
        self.tensors, self.rows = columns.tensors, rows
        self._forms = _forms(columns.tensors)
        self.is_copy = any(not _is_on(tensor, device) for tensor in columns.tensors)
        self.lookup = torch.arange(len(rows), device="cpu") if self.is_copy else rows
        tensors = columns.tensors
        if self.is_copy:
            with torch.inference_mode(False):  # graphs and backward passes read the copies too
                tensors = tuple(torch.empty(len(rows), *t.shape[1:], dtype=t.dtype, device=device) for t in tensors)
        self.source = _Rows(tensors, columns.form)
        self._seen: list[tuple[int, int]] | None = None
        self.refresh()

    @staticmethod
    def can_hold(columns: Columns, rows: Tensor, device: torch.device) -> bool:
        """Return whether all tensors are on the device, or all on the CPU and their rows in use may be copied."""
        on_device = [_is_on(tensor, device) for tensor in columns.tensors]
        if any(on_device):
            return all(on_device)
        byte_count = sum(t[:1].numel() * t.element_size() * len(rows) for t in columns.tensors)
        return all(t.device.type == "cpu" for t in columns.tensors) and fits(byte_count, device)

    def holds(self, columns: Columns, rows: Tensor) -> bool:
        """Return whether these are the tensors and the rows that this object was made of."""
        return _forms(columns.tensors) == self._forms and torch.equal(rows, self.rows)

    def refresh(self) -> None:
        """Copy the examples, into the same memory, unless their tensors are as they were at the last copy."""
        state = [(tensor._version, tensor.data_ptr()) for tensor in self.tensors]
        if not self.is_copy or self._seen == state:
            return
        self._seen = state
        with torch.inference_mode(False):
            for copied, tensor in zip(self.source.tensors, self.tensors, strict=True):
                if len(self.rows) == len(tensor) and torch.equal(self.rows, self.lookup):  # all, in their order
                    copied.copy_(tensor)
                    continue
                size = max(1, CHUNK_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
                for part, rows in zip(torch.split(copied, size), torch.split(self.rows, size), strict=True):
                    part.copy_(tensor.index_select(0, rows))


def _forms(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(id(t), t.shape, t.dtype, t.device) for t in tensors]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


# Copies


class CopyStream:
    """A CUDA stream that copies batches from pinned memory while the device computes on the batch before.

    The host reads a batch from its loader when the consumer takes the batch, and not earlier, so that generators are
    drawn from in the same order as without copies. The device is then still busy with the batch before, since the host
    does not wait for it. Tensors on a device, and tensors that are more than plain memory on the CPU, are returned as
    they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches on the device, usable on the stream that is current when they are taken."""
        used: deque[torch.cuda.Event] = deque()
        for batch in batches:
            yield self.copy(batch)
            used.append(torch.cuda.current_stream(self.device).record_event())
            if len(used) > MAX_LEAD:
                used.popleft().synchronize()

    def copy(self, batch: Any) -> Any:
        """Return the batch on the device; the current stream waits for the copy, the host does not."""
        copied: list[Tensor] = []

        def copy_tensor(tensor: Tensor) -> Tensor:
            if not _can_be_pinned(tensor):
                return tensor
            copied.append(tensor.pin_memory().to(self.device, non_blocking=True))
            return copied[-1]

        with torch.cuda.stream(self.stream):
            moved = map_tensors(batch, copy_tensor)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self.stream)
        for tensor in copied:  # or the memory of a deleted batch could be written while the consumer still reads it
            tensor.record_stream(consumer)
        return moved


def _can_be_pinned(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
    return plain and not tensor.requires_grad and not tensor.is_quantized


# The iterable


class Feed:
    """Re-iterable batches of a loader for a device; see ``feed``. Other attributes are the loader's own."""

    def __init__(self, loader: Iterable[Any], device: torch.device, *, resident: bool) -> None:
        self.loader, self.device, self.may_be_resident = loader, device, resident
        self.resident: Resident | None = None
        self._copies: CopyStream | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet, while a copy of this object is made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        examples = _examples(self.loader, self.device) if self.may_be_resident else None
        if examples is not None:
            resident = self._held(examples)
            if resident is not None:
                return self._indexed(resident, examples.draw())  # here, since an iterator's beginning may draw too
        batches = iter(self.loader)
        if self.device.type != "cuda":
            return batches
        if self._copies is None:
            self._copies = CopyStream(self.device)
        return self._copies.batches(batches)

    def _held(self, examples: _Examples) -> Resident | None:
        """Return the examples on the device; None if they do not fit there."""
        columns, rows, _ = examples
        if self.resident is None or not self.resident.holds(columns, rows):
            self.resident = None  # frees the copy before the next one is made
            if Resident.can_hold(columns, rows, self.device):
                self.resident = Resident(columns, rows, self.device)
        return self.resident

    def _indexed(self, resident: Resident, draws: Iterable[Tensor]) -> Iterator[Indexed]:
        if isinstance(draws, tuple) and draws:  # all are known: one copy to the device for the whole pass
            order = self._on_device(resident.lookup[torch.cat(draws)])
            batches: Iterable[Tensor] = torch.split(order, [len(positions) for positions in draws])
        else:
            batches = (self._on_device(resident.lookup[positions]) for positions in draws)
        for rows in batches:
            resident.refresh()
            yield Indexed(rows, resident.source)

    def _on_device(self, rows: Tensor) -> Tensor:
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # or the host waits for the copy
        return rows.to(self.device, non_blocking=True)
