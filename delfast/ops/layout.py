"""Units of a parameter, and the layout of packed bits: shared by every op and by Mask.

A parameter with ndim > 1 has one unit per slice along dim 0 (a row: an output channel); a parameter with
ndim <= 1 has one unit per element, so its rows have length 1. Empty parameters have no units. The channels of some
parameters lie along another dimension (``dim``); the ops work along dim 0.

Packed bits: unit or element ``i`` is bit ``i % 8`` (least significant first) of byte ``i // 8``; the bits past the
end of the last byte are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def unit_count(shape: Sequence[int], dim: int = 0) -> int:
    """Return the number of units of a parameter of this shape whose channels lie along ``dim``."""
    numel = math.prod(shape)
    return shape[dim] if len(shape) > 1 and numel else numel


def row_length(shape: Sequence[int], dim: int = 0) -> int:
    """Return the number of elements in one unit: ``numel / shape[dim]`` for ndim > 1, else 1."""
    if len(shape) <= 1:
        return 1
    return math.prod(shape[1:] if dim == 0 else (*shape[:dim], *shape[dim + 1 :]))


def channels_first(tensor: Tensor, dim: int) -> Tensor:
    """Return a view with the channels, which lie along ``dim``, along dim 0, as the ops expect them."""
    return tensor.movedim(dim, 0) if dim else tensor


def packed_bytes(count: int) -> int:
    """Return the number of bytes that ``count`` packed bits occupy."""
    return (count + 7) // 8


def padded_state(values: int) -> int:
    """Return the number of floats that ``values`` state values of one parameter occupy: a multiple of 4."""
    return (values + 3) // 4 * 4


def plan_head(shapes: Sequence[Sequence[int]], by_row: Sequence[bool]) -> tuple[int, list[tuple[int, int]]]:
    """Return the offset of a plan's head in bytes, and each parameter's number of units and elements of a unit."""
    units = [
        (unit_count(shape), row_length(shape) if math.prod(shape) else 1) if rows else (math.prod(shape), 1)
        for shape, rows in zip(shapes, by_row, strict=True)
    ]
    return (sum(packed_bytes(count) for count, _ in units) + 15) // 16 * 16, units


def plan_bytes(shapes: Sequence[Sequence[int]], by_row: Sequence[bool]) -> int:
    """Return the size of the plan of a mask of parameters of these shapes (csrc/delfast/mask_plan.h)."""
    piece_length = 512 if sum(math.prod(shape) for shape in shapes) < 2**25 else 2048
    head, units_of = plan_head(shapes, by_row)
    pieces = 0
    for units, length in units_of:
        if length >= 64:
            pieces += units * -(-length // piece_length)
        elif units:
            pieces += -(-units // max(32, 1024 >> (length - 1).bit_length()))
    return head + 16 + 24 * (len(shapes) + pieces)


def pack(flags: Tensor) -> Tensor:
    """Pack bool (n,) into uint8 (ceil(n/8),), least significant bit first, on the same device."""
    padded = torch.zeros(packed_bytes(flags.numel()) * 8, dtype=torch.uint8, device=flags.device)
    padded[: flags.numel()] = flags.reshape(-1)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, count: int) -> Tensor:
    """Unpack uint8 (ceil(count/8),) into bool (count,), on the same device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).reshape(-1)[:count].bool()


def as_rows(values: Tensor, like: Tensor) -> Tensor:
    """View flat values (n * row length,), each row in the memory order of ``like``'s rows, as (n, *like.shape[1:])."""
    rows = values.numel() // max(1, row_length(like.shape))
    if _channels_last(like):
        return values.view(rows, *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return values.view(rows, *like.shape[1:])


def flat_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Invert ``as_rows``: return a view if ``rows`` is in that memory order already, else a copy."""
    return (rows.movedim(1, -1) if _channels_last(like) else rows).reshape(-1)


def _channels_last(t: Tensor) -> bool:
    return t.ndim > 2 and not t.is_contiguous() and t.movedim(1, -1).is_contiguous()
