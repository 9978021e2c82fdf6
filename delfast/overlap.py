"""Examples that two sets have in common, as far as the loaders show it without reading an example."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from delfast.batches import sampler_of
from delfast.errors import InputError

Places = dict[Hashable, list[NDArray[numpy.int64]]]
"""Positions of examples by the data set that holds them."""

OF_ALL = (SequentialSampler, RandomSampler, DistributedSampler)  # together, the processes read every example


def check_disjoint(sets: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise InputError, by name, if one of ``others`` has an example of one of ``sets``.

    Compared are torch's DataLoaders with torch's own samplers: the positions in one data set that their Subsets and
    samplers select, and the rows of tensors that TensorDatasets share. Contents are not compared: a training set may
    hold an example twice, and one copy may be forgotten. Of every other loader only the object is compared.
    """
    check_distinct(sets, others)
    known = {name: _places(loader) for name, loader in {**sets, **others}.items()}
    for name in sets:
        for other in others:
            count = _common(known[name], known[other])
            if count:
                raise InputError(
                    f"expected a {other} set without examples of the {name} set, got {count} that both have; leave "
                    f"them out of the {other} set: Subset(dataset, indices)"
                )


def check_distinct(sets: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise InputError, by name, if one of ``others`` is the object that is passed as one of ``sets``."""
    for name, loader in sets.items():
        for other, its_loader in others.items():
            if loader is not None and loader is its_loader:
                raise InputError(
                    f"expected a {other} set without examples of the {name} set, got one object as both; pass each set "
                    "its own batches"
                )


def _common(first: Places, second: Places) -> int:
    """Return the number of examples in both."""
    count = 0
    for key in first.keys() & second.keys():
        smaller, larger = sorted((numpy.concatenate(first[key]), numpy.concatenate(second[key])), key=len)
        count += int(numpy.isin(numpy.unique(smaller), larger).sum())  # sorts no set of millions
    return count


def _places(loader: Any) -> Places:
    """Return the examples that a loader can yield; empty where this is not known."""
    found: Places = {}
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return found
    try:
        drawn = _drawn(loader)
        if drawn is not None:
            _add(loader.dataset, _from_beginning(drawn, loader.dataset), found)
    except (TypeError, ValueError, IndexError, NotImplementedError):  # no length, or indices that are no positions
        return {}
    return found


def _drawn(loader: DataLoader[Any]) -> NDArray[numpy.int64] | None:
    """Return the positions in the loader's data set that its sampler can draw; None for a sampler of another type."""
    batches, sampler = loader.batch_sampler, sampler_of(loader)
    if isinstance(batches, (list, tuple)):
        return _integers([position for batch in batches for position in batch])
    if batches is not None and type(batches) is not BatchSampler:
        return None
    if type(sampler) in OF_ALL:
        source: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
        return numpy.arange(len(source))
    if type(sampler) is SubsetRandomSampler:
        return _integers(sampler.indices)
    return _integers(sampler) if isinstance(sampler, (list, tuple, range)) else None


def _add(dataset: Any, positions: NDArray[numpy.int64], found: Places) -> None:
    """Add the examples at these positions, by the innermost data set that holds them."""
    if type(dataset) is Subset:
        chosen = _integers(dataset.indices)[positions]
        _add(dataset.dataset, _from_beginning(chosen, dataset.dataset), found)
    elif type(dataset) is ConcatDataset:
        begin = 0
        for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            _add(part, positions[(begin <= positions) & (positions < end)] - begin, found)
            begin = end
    else:
        rows = _rows(dataset) if type(dataset) is TensorDataset else None
        key, first = (id(dataset), 0) if rows is None else rows
        found.setdefault(key, []).append(first + positions)


def _from_beginning(positions: NDArray[numpy.int64], dataset: Any) -> NDArray[numpy.int64]:
    """Return positions in a data set, those that count from its end as numbers from its beginning."""
    if not (positions < 0).any():
        return positions
    return numpy.where(positions < 0, positions + len(dataset), positions)


def _rows(dataset: TensorDataset) -> tuple[Hashable, int] | None:
    """Return what identifies rows of the memory that the tensors share, and the number of the first row.

    All tensors count: with the same images and other labels the examples are others. None for tensors whose rows
    cannot be distinguished by their addresses.
    """
    parts, firsts = [], []
    for t in dataset.tensors:
        if type(t) is not Tensor or t.layout is not torch.strided or not t.numel() or not t.stride(0):
            return None
        first, rest = divmod(int(t.storage_offset()), t.stride(0))
        parts.append((t.untyped_storage().data_ptr(), t.dtype, t.stride(), tuple(t.shape[1:]), rest))
        firsts.append(first)
    return (tuple(parts), *(first - firsts[0] for first in firsts)), firsts[0]


def _integers(values: Iterable[Any]) -> NDArray[numpy.int64]:
    """Return positions as int64 (N,). ValueError for anything else."""
    found = numpy.asarray(values if isinstance(values, (range, Tensor, numpy.ndarray)) else list(values))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError("no positions")
    return found.astype(numpy.int64)
