"""Examples drawn from a loader into memory, for batches of any choice of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from delfast.batches import LossFn, examples_in, map_tensors, plain, split_batch, tensors_of
from delfast.device_checks import prefixed
from delfast.errors import InputError
from delfast.language import is_token_batch


class Examples:
    """Examples of a loader, on the CPU, by their positions in it. ``batch(positions)`` returns a batch of them."""

    def __init__(self, loader: Iterable[Any], positions: Tensor, loss_fn: LossFn | None, name: str) -> None:
        """Read the loader once and keep the examples of these positions, int64, repeated or not.

        Raises InputError, which begins with the set's name, for batches that cannot be cut into examples, and for
        batches whose examples have different shapes.
        """
        wanted = torch.unique(positions)
        self._row = {position: row for row, position in enumerate(wanted.tolist())}
        kept: list[Any] = []
        begin = 0
        with prefixed(f"{name} set"):
            for each in loader:
                batch = _whole(each, loss_fn)
                count = examples_in(batch, lambda *_: torch.empty(0))
                if count is None:
                    raise InputError(
                        "expected batches of tensors with a row for each example, got other parts; make them tensors"
                    )
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
    """Return one batch of the examples of several. InputError unless their tensors have one shape."""
    return _joined(list(batches))


def _whole(batch: Any, loss_fn: LossFn | None) -> Any:
    """Return (input, target) without an index, or the batch as it is for a ``loss_fn`` or a language model."""
    batch = plain(batch)
    return batch if loss_fn is not None or is_token_batch(batch) else tuple(split_batch(batch)[1:])


def _rows(batch: Any, rows: Tensor) -> Any:
    return map_tensors(batch, lambda tensor: tensor.detach()[rows.to(tensor.device)].cpu())


def _joined(batches: list[Any]) -> Any:
    columns = list(zip(*(tensors_of(batch) for batch in batches), strict=True))
    for column in columns:
        shapes = {tuple(tensor.shape[1:]) for tensor in column}
        if len(shapes) > 1:
            first, second = sorted(shapes)[:2]
            raise InputError(f"expected examples of one shape in all batches, got {first} and {second}; pad them alike")
    tensors = iter([torch.cat(column) for column in columns])
    return map_tensors(batches[0], lambda _: next(tensors))
