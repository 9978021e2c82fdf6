"""Weight gradients of the selected rows alone: less arithmetic, in the form that the library computes fastest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.compaction.plan import RowPlan
from delfast.compaction.rules import rule_of

convolution_backward = torch.ops.aten.convolution_backward.default


def linear_rows_gradient(x: Tensor, output_gradient: Tensor, gathered: Tensor | None, kept: Tensor | None) -> Tensor:
    """Return the selected rows of a linear layer's weight gradient, from x (N, in) and the output gradient (N, out)."""
    found = gather(output_gradient, gathered).t() @ x
    return found if kept is None else take_rows(found, kept)


def convolution_rows_gradient(
    x: Tensor, output_gradient: Tensor, weight: Tensor, plan: RowPlan, geometry: tuple[Any, ...]
) -> Tensor:
    """Return the selected rows of a convolution's weight gradient.

    x: (N, C_in, *positions). output_gradient: (N, C_out, *positions). geometry: stride, padding, dilation, transposed,
    output padding.
    """
    transposed = geometry[3]
    small_x = gather(x, plan.gathered if transposed else plan.opposite)
    small_gradient = gather(output_gradient, plan.opposite if transposed else plan.gathered)
    row_side, other_side = (small_x, small_gradient) if transposed else (small_gradient, small_x)
    if plan.groups == 1 and _is_small_map(row_side, other_side):
        found = by_offsets(row_side, other_side, weight.shape[2:], geometry)
    else:
        like = weight.narrow(0, 0, row_side.shape[1])  # only its shape is used
        _, found, _ = convolution_backward(
            small_gradient, small_x, like, None, *geometry, plan.groups, [False, True, False]
        )
    return found if plan.kept is None else take_rows(found, plan.kept)


def by_offsets(row_side: Tensor, other_side: Tensor, kernel: torch.Size, geometry: tuple[Any, ...]) -> Tensor:
    """Return the weight gradient (R, O, *kernel) of a convolution, by one matrix product for each kernel position k.

    Element (r, o, k) is Σ over p of ``row_side[:, r, p] other_side[:, o, p stride + k dilation - padding]``.

    row_side: (N, R, *positions), the output gradient, or the input of a transposed convolution. other_side:
    (N, O, ...), the input, or the output gradient of a transposed convolution. kernel: its size. geometry: as in
    ``convolution_rows_gradient``.
    """
    stride, padding, dilation, *_ = geometry
    left = row_side.movedim(1, -1).reshape(-1, row_side.shape[1]).t()
    padded = functional.pad(other_side.movedim(1, -1), [0, 0, *(p for p in reversed(padding) for _ in range(2))])
    found = row_side.new_empty(row_side.shape[1], *kernel, other_side.shape[1])
    with torch.autocast(row_side.device.type, enabled=False):  # autocast would round a product, but not a convolution
        for offset in itertools.product(*map(range, kernel)):
            window: tuple[slice, ...] = (slice(None),)
            for k, d, s, count in zip(offset, dilation, stride, row_side.shape[2:], strict=True):
                window += (slice(k * d, k * d + (count - 1) * s + 1, s),)
            at: tuple[slice | int, ...] = (slice(None), *offset)
            found[at] = left @ padded[window].reshape(-1, other_side.shape[1])
    return found.movedim(-1, 1)


def _is_small_map(row_side: Tensor, other_side: Tensor) -> bool:
    """Return whether the feature map is so small that ``by_offsets`` is faster."""
    positions = math.prod(row_side.shape[2:])
    rule = rule_of(row_side.device, "convolution")
    return rule.multiplies_by_offsets(other_side.shape[1], positions, row_side.dtype)


def take_rows(gradient: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """Return these rows along ``dim``, in the memory format of ``gradient``, which ``index_select`` does not keep."""
    indices: list[Tensor | None] = [None] * dim + [rows]
    taken: Tensor = torch.ops.aten.index(gradient, indices)
    return taken


def gather(values: Tensor, channels: Tensor | None) -> Tensor:
    """Return these channels (dim 1) of ``values``, in the memory format of ``values``; None: all."""
    if channels is None:
        return values
    last = values.movedim(1, -1)
    if last.is_contiguous():  # channels-last, or two dimensions
        flat: Tensor = torch.ops.delfast.gather_columns(last.reshape(-1, last.shape[-1]), channels)
        return flat.view(*last.shape[:-1], len(channels)).movedim(-1, 1)
    return values.index_select(1, channels)
