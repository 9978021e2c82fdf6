"""Examples drawn from a loader into memory, for batches of any choice of them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from delfast.batches import LossFn, plain, split_batch
from delfast.device_checks import prefixed
from delfast.errors import InputError
from delfast.language import is_token_batch


class UncutBatches(InputError):
    """Batches of a form that cannot be cut into examples.

    The text names types and shapes and never a value: it is kept in an audit, and a value may name a person.
    """


class Examples:
    """Examples of a loader, on the CPU, by their positions in it. ``batch(positions)`` returns a batch of them."""

    def __init__(self, loader: Iterable[Any], positions: Tensor, loss_fn: LossFn | None, name: str) -> None:
        """Read the loader once and keep the examples of these positions, int64, repeated or not.

        Raises UncutBatches, whose text begins with the set's name, and InputError for a loader that has fewer examples
        than before.
        """
        wanted = torch.unique(positions)
        self._row = {position: row for row, position in enumerate(wanted.tolist())}
        kept: list[Any] = []
        begin = 0
        with prefixed(f"{name} set"):
            for each in loader:
                batch = _whole(each, loss_fn)
                count = _count(batch)
                rows = wanted[(wanted >= begin) & (wanted < begin + count)] - begin
                if len(rows):
                    kept.append(_rows(batch, rows))
                begin += count
            if len(wanted) and begin <= int(wanted[-1]):
                raise InputError(
                    f"expected as many examples in every pass, got {begin}; pass a loader without sampling"
                )
            self._all = _joined(kept)

    def batch(self, positions: Sequence[int]) -> Any:
        """Return the batch of the examples at these positions of the loader."""
        return _rows(self._all, torch.tensor([self._row[position] for position in positions]))


def joined(*batches: Any) -> Any:
    """Return one batch of the examples of several. UncutBatches unless their tensors have one shape."""
    return _joined(list(batches))


def _whole(batch: Any, loss_fn: LossFn | None) -> Any:
    """Return (input, target) without an index, or the batch as it is for a ``loss_fn`` or a language model."""
    batch = plain(batch)
    return batch if loss_fn is not None or is_token_batch(batch) else tuple(split_batch(batch)[1:])


def _count(batch: Any) -> int:
    """Return the number of examples. UncutBatches unless each part of the batch has one row for each."""
    sizes = {None if isinstance(part, Tensor) and not part.ndim else len(part) for part in _parts(batch)}
    if len(sizes) != 1 or None in sizes:
        raise UncutBatches(
            "expected batches of tensors, and lists of texts, with a row for each example, got other parts; make them "
            "tensors"
        )
    return sizes.pop()  # type: ignore[return-value]


def _rows(batch: Any, rows: Tensor) -> Any:
    def choose(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.detach()[rows.to(part.device)].cpu()
        return [part[row] for row in rows.tolist()]

    return _map_parts(batch, choose)


def _joined(batches: list[Any]) -> Any:
    columns = list(zip(*map(_parts, batches), strict=True))
    for column in columns:
        shapes = {tuple(part.shape[1:]) for part in column if isinstance(part, Tensor)}
        if len(shapes) > 1:
            first, second = sorted(shapes)[:2]
            raise UncutBatches(
                f"expected examples of one shape in all batches, got {first} and {second}; pad them alike"
            )
    parts = iter(
        [torch.cat(column) if isinstance(column[0], Tensor) else [*chain.from_iterable(column)] for column in columns]
    )
    return _map_parts(batches[0], lambda _: next(parts))


def _parts(batch: Any) -> list[Any]:
    found: list[Any] = []
    _map_parts(batch, found.append)
    return found


def _map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every part of a batch that has a row for each example: tensors, and lists of texts.

    As ``map_tensors``, except for the lists, which torch's collate function makes of texts. Raises UncutBatches for
    other parts.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (str, bytes)) for item in value):
        return function(list(value))
    if isinstance(value, (list, tuple)):
        items = [_map_parts(item, function) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, (dict, UserDict)):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = _map_parts(item, function)
        return changed
    if isinstance(value, Mapping):
        return {key: _map_parts(item, function) for key, item in value.items()}
    raise UncutBatches(
        f"expected batches of tensors, and lists of texts, with a row for each example, got {type(value).__name__}; "
        "make it a tensor"
    )
