"""What the weight gradient of some rows takes: which channels to gather, and what of the result to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16  # channels that a vector holds (AVX-512, float32): libraries pad channel counts to multiples of it
MAX_GATHERED_FRACTION = 0.9  # of the blocks: with more of them, gathering saves nothing (benchmarks/test_steps.py)


@dataclass(frozen=True)
class RowPlan:
    """How a layer with ``groups`` gets the gradient of its weight's selected rows.

    ``gathered``: channels of the tensor whose channels are the weight's rows (the output gradient; for a transposed
    convolution its input), ``opposite``: channels of the other one, both int64 or None for all. ``kept``: which rows of
    that smaller gradient are wanted, None for all. ``groups``: of the smaller problem.
    """

    gathered: Tensor | None
    opposite: Tensor | None
    kept: Tensor | None
    groups: int


def plan_rows(rows: Tensor, channels: int, opposite_channels: int, groups: int) -> RowPlan:
    """The plan for int64 ``rows``, ascending, of ``channels``. Groups without a selected row are left out; within one
    group exactly the rows are gathered; within several the groups are whole, since they must be of one size.
    """
    if groups == 1:
        if _blocks(len(rows)) > MAX_GATHERED_FRACTION * _blocks(channels):
            return RowPlan(None, None, rows, 1)
        return RowPlan(rows, None, None, 1)
    size, opposite_size = channels // groups, opposite_channels // groups
    used = torch.unique(rows // size)
    if len(used) > MAX_GATHERED_FRACTION * groups:
        return RowPlan(None, None, rows, groups)
    position = torch.searchsorted(used, rows // size) * size + rows % size
    kept = None if len(rows) == len(used) * size else position
    return RowPlan(_members(used, size), _members(used, opposite_size), kept, len(used))


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _members(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
