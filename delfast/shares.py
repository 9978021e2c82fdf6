"""The share of a process in a loader of the whole set: every W-th batch, or what a sharding sampler gives it."""

from __future__ import annotations

import itertools
import operator
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
)

from delfast.batches import LOSS_FN_ADVICE, LossFn, draws_a_subset, examples_in, sampler_of, warn_about_loader
from delfast.contents import content_of, signature_of
from delfast.errors import InputError
from delfast.processes import Processes

# the options of a DataLoader that decide how it loads the examples of a batch and puts them together
LOADING = (
    "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "prefetch_factor",
)  # fmt: skip
WHOLE_SET = "pass the loader of the whole set without a sampler, or a list of all its batches: they are shared out here"
HASHES = 2**48  # the number of different hashes, whose sum over thousands of processes an int64 holds


@dataclass(frozen=True)
class Share:
    """The batches of one process.

    batches: iterable once.
    stand_in: returns a batch for a step in which this process has none, if it never had one; its result does not count.
    finish: raises InputError, on every process, if the batches of all of them are not the set; for after the last
        batch.
    places: the place in the set of each example of this process, or more places; None if the processes take the set's
        batches in turn.
    """

    batches: Iterable[Any]
    stand_in: Callable[[], Any]
    finish: Callable[[], None]
    places: Sequence[int] | None = None


def share(loader: Any, processes: Processes, loss_fn: LossFn | None, advice: str = LOSS_FN_ADVICE) -> Share:
    """Return this process's share of a loader. All processes call it together.

    The loader is the whole set's, and process r of W takes the batches r, r + W, and so on. Of a DataLoader the
    indices are shared out, so that no process loads what it does not use. Other iterables are iterated as a whole. A
    loader whose sampler shards already, such as a DistributedSampler, is used as it is, without the examples that the
    sampler repeats. Raises InputError, on every process, unless the shares make up the data set. Warns of a data set
    that augments at random.
    """
    if is_torchs(loader):
        shared = _share_of_indices(loader, processes)
    else:
        shared = _share_of_iterable(loader, processes, loss_fn, advice)
    with processes.together():
        # a sampler that shards is meant to omit examples
        whole = loader if sharding(loader) is None else SimpleNamespace(dataset=getattr(loader, "dataset", None))
        warn_about_loader(whole, "set")
    return shared


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
        units = _units(loader)
        sharded = checked_sharding(loader, processes)
        spare = units[:1]
        units = _without_repeats(loader, units)
        whole = range(len(loader.dataset))
        expected = [operator.index(i) for i in sampler_of(loader).indices] if draws_a_subset(loader) else whole
        settings = f"{_hash_of(expected)}; sharded: {sharded is not None}"
    check_same_set(loader, processes, settings, f"expected the same data set on every process, got others; {WHOLE_SET}")
    if sharded is None:
        if not processes.is_same(repr(units)):  # of a sampler that each process has seeded differently
            units = processes.first_of_all(units)
        spare = units[:1]
        units = units[processes.rank :: processes.size]
    else:
        # processes that hold a network between them need the same share, and so the same sum over the data group
        shares = processes.count_data(zlib.crc32(f"{processes.rank} {units}".encode()))
        processes.check_same(
            str(shares), f"expected the same shares on processes that hold a model together, got others; {WHOLE_SET}"
        )
    drawn = _examples_of(loader, units)
    total, hashes = processes.count_data(len(drawn)), processes.count_data(_hash_of(drawn)) % HASHES
    with processes.together():
        if (total, hashes) != (len(expected), _hash_of(expected)):
            _refuse_count(total, len(expected))
    options = {name: getattr(loader, name) for name in (*LOADING, "generator")}

    def batches(chosen: list[Any]) -> Iterable[Any]:
        if loader.batch_sampler is None:
            return DataLoader(loader.dataset, batch_size=None, sampler=chosen, **options)
        return DataLoader(loader.dataset, batch_sampler=chosen, **options)

    def stand_in() -> Any:
        if not spare:
            raise _empty()
        return next(iter(batches(spare)))

    places = _places(loader, processes)
    if places is None and isinstance(sampler_of(loader), DistributedSampler):
        places = drawn  # of a subclass, which may take the examples in any order
    return Share(batches(units), stand_in, lambda: None, places)


def check_same_set(loader: Any, processes: Processes, settings: str, error: str) -> None:
    """Raise InputError with ``error`` on every process unless all have the same settings and torch's loaders of a set.

    Examples that are not the same each time they are loaded are not compared; only where they differ is that found out.
    """
    with processes.together():
        once = signature_of(loader)
    if not processes.is_same(f"{once}; {settings}"):
        with processes.together():
            constant = signature_of(loader, without_varying=True)
        processes.check_same(f"{constant}; {settings}", error)


def _places(loader: Any, processes: Processes) -> Sequence[int] | None:
    """Return the places of the examples that torch's DistributedSampler gives this process, and more; else None."""
    takes_turns = type(sampler_of(loader)) is DistributedSampler and _batch_sampler_of(loader) is not None
    return range(processes.rank, sys.maxsize, processes.size) if takes_turns else None


def _units(loader: Any) -> list[Any]:
    """Return the indices of each batch as int; of a loader without batch_size, those of its items."""
    if _batch_sampler_of(loader) is None:
        return [_index(drawn) for drawn in loader.sampler]
    return [[_index(drawn) for drawn in batch] for batch in loader.batch_sampler]


def _examples_of(loader: Any, units: list[Any]) -> list[int]:
    return units if _batch_sampler_of(loader) is None else list(itertools.chain.from_iterable(units))


def _batch_sampler_of(loader: Any) -> Any:
    return getattr(loader, "batch_sampler", None)


def refuse_overlap(loader: Any, processes: Processes, what: str) -> None:
    """Raise InputError, on every process, if sharding samplers draw an example twice, their repeats at the end aside.

    The draws of one pass are made and counted by example, for training, where a sampler may omit examples. Data sets
    that shard themselves are not checked: their indices are those of a share. All processes call it together.
    """
    with processes.together():
        samplers = SimpleNamespace(batch_sampler=_batch_sampler_of(loader), sampler=getattr(loader, "sampler", None))
        dataset = getattr(loader, "dataset", None)
        by_index = sharding(samplers) is not None and not isinstance(dataset, IterableDataset)
        drawn = _examples_of(loader, _without_repeats(loader, _units(loader))) if by_index else []
        size = (_length(loader) or 0) if by_index else 0
        if drawn and not 0 <= min(drawn) <= max(drawn) < size:  # of no size: a loader that does not show its data set
            raise InputError(
                f"expected a sampler of indices in [0, {size}) for the {what} set, got {min(drawn)} to {max(drawn)}; "
                "give it the data set of the loader"
            )
    processes.check_same(f"{size}", f"expected the same {what} set on every process, got other lengths; {WHOLE_SET}")
    counts = torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=size).int().to(processes.device)
    processes.add_data([counts])
    with processes.together():
        if (counts > 1).any():
            raise InputError(
                f"expected each example of the {what} set at most once on all processes together, got "
                f"{int((counts > 1).sum())} of {size} more often: the sampler repeats some, or is seeded otherwise on "
                f"some processes; {WHOLE_SET}"
            )


def _index(drawn: Any) -> int:
    """Return what a sampler has drawn as int; InputError for what is no integer."""
    try:
        return operator.index(drawn)
    except TypeError:
        raise InputError(
            f"expected a sampler of integer indices, got {type(drawn).__name__}, whose shares cannot be checked; "
            f"{WHOLE_SET}"
        ) from None


def _hash_of(indices: Sequence[int]) -> int:
    """Return the sum, modulo HASHES, of a hash of each index (splitmix64): equal for equal sets in any order."""
    mixed = numpy.asarray(indices, dtype=numpy.int64).astype(numpy.uint64) + numpy.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    return int((mixed ^ (mixed >> numpy.uint64(31))).sum(dtype=numpy.uint64)) % HASHES


def _without_repeats(loader: Any, units: list[Any]) -> list[Any]:
    """Return the batches of indices without those that a DistributedSampler repeats to give all ranks as many.

    Index i of rank r is at position r + i W of the whole order; the repeats are the positions past its end.
    """
    sampler = sampler_of(loader)
    known = _batch_sampler_of(loader) is None or type(loader.batch_sampler) is BatchSampler
    if type(sampler) is not DistributedSampler or sampler.drop_last or not known:
        return units
    left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    if _batch_sampler_of(loader) is None:
        return units[:left]
    kept = []
    for indices in units:
        kept.append(indices[:left])
        left -= len(kept[-1])
    return [indices for indices in kept if indices]


# Other iterables


def _share_of_iterable(loader: Any, processes: Processes, loss_fn: LossFn | None, advice: str) -> Share:
    with processes.together():
        sharded = checked_sharding(loader, processes)
        source = iter(loader)
        first = list(itertools.islice(source, 1))
    stream = _Stream(itertools.chain(first, source), processes, loss_fn, advice, is_share=sharded is not None)
    with processes.together():
        batch = content_of(first[0]) if first else "no batch"
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
            raise _empty()
        return first[0]

    return Share(stream, stand_in, lambda: stream.check(size), _places(loader, processes))


class _Stream:
    """An iterable once over every W-th batch of an iterable, or over all of one that is a share already."""

    def __init__(
        self, source: Iterator[Any], processes: Processes, loss_fn: LossFn | None, advice: str, *, is_share: bool
    ) -> None:
        self._source, self._processes, self._is_share = source, processes, is_share
        self._loss_fn, self._advice = loss_fn, advice
        self._batches, self._examples = 0, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._source:
            mine = self._is_share or self._batches % self._processes.size == self._processes.rank
            self._batches += 1
            self._examples += examples_in(batch, self._loss_fn, self._advice) or 0
            if mine:
                yield batch

    def check(self, size: int | None) -> None:
        """Raise InputError unless all processes read the whole set, or their shares are the whole set."""
        if not self._is_share:
            self._processes.check_same(
                str(self._batches),
                f"expected as many batches on every process, got more on some; {WHOLE_SET}",
            )
            return
        total = self._processes.count_data(self._examples)
        with self._processes.together():
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
        f"loader has drop_last=True, or the sampler repeats or omits some, or is seeded otherwise on some processes; "
        f"{WHOLE_SET}"
    )


def _empty() -> InputError:
    return InputError("expected a set of at least one example on every process, got none; check its loader")
