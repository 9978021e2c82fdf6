"""The plan of a weight gradient for selected rows: the channels to gather, and the rows of the result to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from delfast.compaction.rules import Rule

BLOCK = 16  # channels in a vector (AVX-512, float32): libraries pad the number of channels to a multiple


@dataclass(frozen=True)
class RowPlan:
    """The smaller problem that gives the gradient of the selected rows of a layer's weight.

    Indices are int64, or None for all.

    gathered: channels of the tensor whose channels are the weight's rows: the output gradient, or the input of a
        transposed convolution.
    opposite: channels of the other tensor.
    kept: the selected rows of the smaller gradient.
    groups: number of groups of the smaller problem.
    """

    gathered: Tensor | None
    opposite: Tensor | None
    kept: Tensor | None
    groups: int

    def to(self, device: torch.device) -> RowPlan:
        """Return the plan with its indices on this device."""
        gathered, opposite, kept = (
            None if index is None else index.to(device) for index in (self.gathered, self.opposite, self.kept)
        )
        return RowPlan(gathered, opposite, kept, self.groups)


def plan_rows(rows: Tensor, channels: int, opposite_channels: int, groups: int, rule: Rule) -> RowPlan:
    """Return the plan for ``rows`` (int64, ascending) of ``channels`` channels.

    With one group, exactly the rows are gathered. With several, groups without a selected row are left out and the
    others are gathered in full, since all groups must have the same size.
    """
    if groups == 1:
        gathers = rule.gathers(_blocks(len(rows)), _blocks(channels))
        return RowPlan(rows, None, None, 1) if gathers else RowPlan(None, None, rows, 1)
    size, opposite_size = channels // groups, opposite_channels // groups
    used = torch.unique(rows // size)
    if not rule.gathers(len(used), groups):
        return RowPlan(None, None, rows, groups)
    position = torch.searchsorted(used, rows // size) * size + rows % size
    kept = None if len(rows) == len(used) * size else position
    return RowPlan(_members(used, size), _members(used, opposite_size), kept, len(used))


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _members(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
