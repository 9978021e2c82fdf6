"""The plan of a weight gradient for selected rows: the channels to gather, and the rows of the result to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16  # channels in a vector (AVX-512, float32): libraries pad the number of channels to a multiple
MAX_GATHERED_FRACTION = 0.9  # of the blocks; above it gathering saves no time (benchmarks/test_steps.py)


@dataclass(frozen=True)
class RowPlan:
    """The smaller problem that gives the gradient of the selected rows of a layer's weight.

    ``gathered``: channels of the tensor whose channels are the weight's rows: the output gradient, or the input of a
    transposed convolution. ``opposite``: channels of the other tensor. ``kept``: the selected rows of the smaller
    gradient. All three are int64 indices, or None for all. ``groups``: number of groups of the smaller problem.
    """

    gathered: Tensor | None
    opposite: Tensor | None
    kept: Tensor | None
    groups: int


def plan_rows(rows: Tensor, channels: int, opposite_channels: int, groups: int) -> RowPlan:
    """Return the plan for ``rows`` (int64, ascending) of ``channels`` channels.

    With one group, exactly the rows are gathered. With several, groups without a selected row are left out and the
    others are gathered in full, since all groups must have the same size.
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
