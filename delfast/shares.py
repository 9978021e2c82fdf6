"""The share of a process in a loader of the whole set: every W-th batch, or what a sharding sampler gives it."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
)

from delfast.batches import LossFn, draws_a_subset, examples_in, sampler_of, tensors_of
from delfast.errors import InputError
from delfast.processes import Processes

# the options of a DataLoader that decide how it loads the examples of a batch and puts them together
LOADING = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor",
)  # fmt: skip
WHOLE_SET = "pass the loader of the whole set without a sampler, which is shared out here"


@dataclass(frozen=True)
class Share:
    """The batches of one process.

    batches: iterable once. stand_in: returns a batch for a step in which this process has none, if it never had one;
    its result does not count. finish: raises InputError, on every process, if the batches of all of them are not the
    set; for after the last batch. by_example: whether the processes take the set's examples in turn, as by a
    DistributedSampler, and not its batches.
    """

    batches: Iterable[Any]
    stand_in: Callable[[], Any]
    finish: Callable[[], None]
    by_example: bool = False


def share(loader: Any, processes: Processes, loss_fn: LossFn | None) -> Share:
    """Return this process's share of a loader. All processes call it together.

    The loader is the whole set's, and process r of W takes the batches r, r + W, and so on. Of a DataLoader the
    indices are shared out, so that no process loads what it does not use. Other iterables are iterated as a whole. A
    loader whose sampler shards already, such as a DistributedSampler, is used as it is, without the examples that the
    sampler repeats. Raises InputError, on every process, unless the shares make up the data set.
    """
    if is_torchs(loader):
        return _share_of_indices(loader, processes)
    return _share_of_iterable(loader, processes, loss_fn)


def refuse_sharded(loader: Any) -> None:
    """Raise InputError for a loader that yields the share of one of several processes."""
    found = sharding(loader)
    if found is not None and found[0] > 1:
        raise InputError(
            f"expected a loader of the whole set, got one whose {found[2]} yields the share of rank {found[1]} of "
            f"{found[0]}; pass group= so that the processes share the set, or the whole set's loader"
        )


# torch's DataLoader: its indices


def is_torchs(loader: Any) -> bool:
    """Return whether a loader is torch's DataLoader of examples by index, also with a subclass's other options."""
    own = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return own and not isinstance(loader.dataset, IterableDataset)


def _share_of_indices(loader: Any, processes: Processes) -> Share:
    with processes.together():
        # the indices of each batch; of a loader without batch_size, its own items
        units = list(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
        sharded = checked_sharding(loader, processes)
        spare = units[:1]
        units = _without_repeats(loader, units)
        expected = len(loader.sampler) if draws_a_subset(loader) else len(loader.dataset)
        signature = f"{signature_of(loader.dataset)}; sharded: {sharded is not None}"
    processes.check_same(
        signature,
        f"expected the same data set on every process, got others; {WHOLE_SET}",
    )
    if sharded is None:
        if not processes.is_same(repr(units)):  # of a sampler that each process has seeded differently
            units = processes.first_of_all(units)
        spare = units[:1]
        units = units[processes.rank :: processes.size]
    drawn = len(units) if loader.batch_sampler is None else sum(map(len, units))
    total = processes.count_data(drawn)
    if total != expected:
        _refuse_count(total, expected)
    options = {name: getattr(loader, name) for name in (*LOADING, "generator")}

    def batches(chosen: list[Any]) -> Iterable[Any]:
        if loader.batch_sampler is None:
            return DataLoader(loader.dataset, batch_size=None, sampler=chosen, **options)
        return DataLoader(loader.dataset, batch_sampler=chosen, **options)

    def stand_in() -> Any:
        return next(iter(batches(spare)))

    by_example = loader.batch_sampler is not None and isinstance(sampler_of(loader), DistributedSampler)
    return Share(batches(units), stand_in, lambda: None, by_example)


def _without_repeats(loader: Any, units: list[Any]) -> list[Any]:
    """Return the batches of indices without those that a DistributedSampler repeats to give all ranks as many.

    Index i of rank r is at position r + i W of the whole order; the repeats are the positions past its end.
    """
    sampler = sampler_of(loader)
    known = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    if type(sampler) is not DistributedSampler or sampler.drop_last or not known:
        return units
    left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    if loader.batch_sampler is None:
        return units[:left]
    kept = []
    for indices in units:
        kept.append(indices[:left])
        left -= len(kept[-1])
    return [indices for indices in kept if indices]


def signature_of(dataset: Any) -> str:
    """Return what distinguishes data sets without loading an example: types, lengths, and what is in memory."""
    parts = []
    while dataset is not None:
        parts.append(f"{type(dataset).__qualname__} of {len(dataset)}")
        if isinstance(dataset, Subset):
            parts.append(repr(zlib.crc32(repr([int(i) for i in dataset.indices]).encode())))
        if isinstance(dataset, TensorDataset):
            parts += [f"{t.dtype} {tuple(t.shape)} {checksum([t[:1], t[-1:]])}" for t in dataset.tensors]
        dataset = getattr(dataset, "dataset", None)
    return "; ".join(parts)


# Other iterables


def _share_of_iterable(loader: Any, processes: Processes, loss_fn: LossFn | None) -> Share:
    with processes.together():
        sharded = checked_sharding(loader, processes)
        source = iter(loader)
        first = list(itertools.islice(source, 1))
    stream = _Stream(itertools.chain(first, source), processes, loss_fn, is_share=sharded is not None)
    batch = str(checksum(tensors_of(first[0]))) if first else "no batch"
    content = batch if sharded is None else "a share"
    processes.check_same(
        content, f"expected the same batches on every process, got another first one on some; {WHOLE_SET}"
    )
    with processes.together():
        size = _length(loader)
        if sharded is not None and size is None:
            raise InputError(
                f"expected a loader whose shares can be counted, got a {sharded[2]} that shards a set without a "
                f"length; {WHOLE_SET}"
            )

    def stand_in() -> Any:
        if not first:
            raise InputError("expected a set of at least one example on every process, got none; check its loader")
        return first[0]

    return Share(stream, stand_in, lambda: stream.check(size), isinstance(sampler_of(loader), DistributedSampler))


class _Stream:
    """An iterable once over every W-th batch of an iterable, or over all of one that is a share already."""

    def __init__(self, source: Iterator[Any], processes: Processes, loss_fn: LossFn | None, *, is_share: bool) -> None:
        self._source, self._processes, self._loss_fn, self._is_share = source, processes, loss_fn, is_share
        self._batches, self._examples = 0, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source:
            mine = self._is_share or self._batches % self._processes.size == self._processes.rank
            self._batches += 1
            self._examples += examples_in(batch, self._loss_fn) or 0
            if mine:
                yield batch

    def check(self, size: int | None) -> None:
        """Raise InputError unless all processes saw the whole set, or their shares are the whole set."""
        if not self._is_share:
            self._processes.check_same(
                str(self._batches),
                f"expected as many batches on every process, got more on some; {WHOLE_SET}",
            )
            return
        total = self._processes.count_data(self._examples)
        if size is not None and total != size:
            _refuse_count(total, size)


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (TypeError, AttributeError, NotImplementedError):
        return None


# Samplers that shard


def sharding(loader: Any) -> tuple[int, int, str] | None:
    """Return the number of processes, the rank and the type of a sampler or data set that shards; None if none does.

    The attributes are those of torch's DistributedSampler and of Accelerate's shards.
    """
    for part in (getattr(loader, "batch_sampler", None), sampler_of(loader), getattr(loader, "dataset", None)):
        for size, rank in (("num_replicas", "rank"), ("num_processes", "process_index")):
            found = getattr(part, size, None), getattr(part, rank, None)
            if isinstance(found[0], int) and isinstance(found[1], int):
                return found[0], found[1], type(part).__name__
    return None


def checked_sharding(loader: Any, processes: Processes) -> tuple[int, int, str] | None:
    """Return how a loader is sharded; None if it is not. InputError unless it is sharded as the group is."""
    found = sharding(loader)
    if found is not None and found[:2] != (processes.size, processes.rank):
        raise InputError(
            f"expected a {found[2]} for rank {processes.rank} of the group's {processes.size} processes, got one for "
            f"rank {found[1]} of {found[0]}; {WHOLE_SET}"
        )
    return found


def _refuse_count(total: int, expected: int) -> None:
    raise InputError(
        f"expected the {expected} examples of the data set, each once, got {total} on all processes together: the "
        f"sampler repeats or omits some; {WHOLE_SET}"
    )


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a checksum of the tensors' bytes."""
    total = 0
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total = zlib.crc32(f"{plain.dtype} {tuple(plain.shape)}".encode(), total)
        if plain.layout is torch.strided and not plain.is_quantized:
            total = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data, total)
    return total
