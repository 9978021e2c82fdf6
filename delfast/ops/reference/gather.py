"""Reference of csrc/cpu/gather: what the backward pass of a compact layer takes of an output gradient."""

from __future__ import annotations

from torch import Tensor


def gather_columns(source: Tensor, columns: Tensor) -> Tensor:
    """(M, n): ``source[:, columns]`` of a contiguous (M, C) and int64 (n,) in [0, C); any dtype of 2 to 8 bytes."""
    if columns.device.type == "cpu":  # on a card torch checks them there
        outside = columns[(columns < 0) | (columns >= source.shape[1])]
        if len(outside):
            raise IndexError(f"expected columns in [0, {source.shape[1]}), got {int(outside[0])}")
    return source.index_select(1, columns)
