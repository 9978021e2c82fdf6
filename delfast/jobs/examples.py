"""The examples of a job's data sets: a digest of some, the class of each, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Number
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, IterableDataset, TensorDataset

from delfast.errors import InputError
from delfast.provenance import digest_tensor

DIGESTED = 64  # examples of a data set that its digest reads
BATCH = 8  # of these in a batch: 8 batches, so that a change by chance, in half of the batches, is found in 255 of 256


class Relabelled(Dataset[Any]):
    """A data set of (input, target) with other targets: ``targets`` int64 (N,), by position."""

    def __init__(self, data: Any, targets: Tensor) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, position: int) -> tuple[Any, Tensor]:
        inputs, _ = self.data[position]
        return inputs, self.targets[position]


class JoinedBatches(BatchSampler):
    """Batches whose last one, of one example, joins the one before it, since BatchNorm cannot train on one."""

    def __len__(self) -> int:
        return super().__len__() - 1

    def __iter__(self) -> Iterator[list[int]]:
        *whole, before, last = super().__iter__()
        yield from [*whole, before + last]


def check_dataset(data: Any) -> int:
    """Return the number of examples. InputError unless ``data`` is a map-style data set with at least one."""
    is_map_style = hasattr(data, "__getitem__") and not isinstance(data, (IterableDataset, Mapping, str, bytes))
    try:
        count = len(data) if is_map_style else -1
    except (TypeError, NotImplementedError):
        count = -1
    if count < 0:
        raise InputError(
            f"expected a map-style data set, with len(data) and data[i], got {type(data).__name__}; return one"
        )
    if count == 0:
        raise InputError("expected a data set of at least one example, got none; check its path")
    return count


def digest_examples(data: Any, count: int) -> bytes:
    """Return the SHA-256 of the content of at most ``DIGESTED`` evenly spaced examples, each read twice.

    InputError for an example that differs between the two readings, and for content of an unknown type.
    """
    total = hashlib.sha256(str(count).encode())
    for position in _evenly_spaced(count).tolist():
        first, second = (_digest(data[position]) for _ in range(2))
        if first != second:
            raise InputError(
                f"expected example {position} to be the same each time it is read, it differs (a random transform?); "
                "return the examples as they are"
            )
        total.update(first)
    return total.digest()


def check_batches(data: Any, count: int, collate: Callable[[list[Any]], Any]) -> None:
    """Collate some batches of the examples that ``digest_examples`` reads, each twice. InputError if two differ."""
    for positions in torch.split(_evenly_spaced(count), BATCH):
        examples = [data[position] for position in positions.tolist()]
        first, second = (_digest(collate(examples)) for _ in range(2))
        if first != second:
            raise InputError(
                "expected preprocess() to return the same batch each time for the same examples, it differs (a random "
                "transform?); leave the examples as they are"
            )


def _evenly_spaced(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, DIGESTED), dtype=torch.float64).round().long()


def _digest(value: Any) -> bytes:
    """Return the SHA-256 of nested tuples, lists and mappings of tensors, arrays, numbers, texts and bytes."""
    if isinstance(value, Tensor):
        return digest_tensor(value)
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        head = f"array {value.dtype.str} {value.shape}"
        return hashlib.sha256(head.encode() + b"\0" + value.tobytes()).digest()
    if isinstance(value, Mapping):
        parts = [part for key in value for part in (_digest(key), _digest(value[key]))]
        return hashlib.sha256(b"mapping" + b"".join(parts)).digest()
    if isinstance(value, (tuple, list)):
        return hashlib.sha256(b"sequence" + b"".join(map(_digest, value))).digest()
    if value is None or isinstance(value, (Number, str, bytes, numpy.generic)):
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")).digest()
    raise InputError(
        f"expected examples of tensors, arrays, numbers and texts, got {type(value).__name__}; add a transform to the "
        "data set that returns tensors"
    )


def class_targets(data: Any, count: int) -> Tensor | None:
    """Return the classes (N,) int64 of (input, target) examples; None unless every target is an integer of 0 or more.

    Every example is read, except those of a TensorDataset. An attribute ``targets`` is not used, since a
    ``target_transform`` may return others.
    """
    if type(data) is TensorDataset and len(data.tensors) == 2:
        targets = data.tensors[1]
        if not _is_integer(targets) or targets.ndim != 1 or int(targets.min()) < 0:
            return None
        return targets.to("cpu", torch.int64).clone()
    found = []
    for position in range(count):
        example = data[position]
        target = _class(example[1]) if isinstance(example, (tuple, list)) and len(example) == 2 else None
        if target is None:
            return None
        found.append(target)
    return torch.tensor(found, dtype=torch.int64)


def _is_integer(value: Tensor) -> bool:
    return value.dtype is not torch.bool and not value.is_floating_point() and not value.is_complex()


def _class(target: Any) -> int | None:
    """Return the class that a target states; None for anything except an integer of 0 or more."""
    if isinstance(target, Tensor) and target.ndim == 0 and _is_integer(target):
        target = int(target)
    is_class = isinstance(target, Integral) and not isinstance(target, bool) and 0 <= int(target) < 2**63
    return int(target) if is_class else None
