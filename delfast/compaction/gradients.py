"""Weight gradients of the selected rows alone: less arithmetic, in the form that the library computes fastest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.compaction.plan import RowPlan

convolution_backward = torch.ops.aten.convolution_backward.default

# Minimum number of channels per position of the feature map from which a product for each position of the kernel beats
# oneDNN's weight gradient. Channels of the tensor that is not on the rows' side: the input, or the output gradient of a
# transposed convolution. Speed against oneDNN, measured on two cores with AMX: 512 channels on maps of 4x4, 1.1 to 1.2
# times in float32 and 4 times in bfloat16; 256 on 8x8, 0.6 and 1.5 times; 128 on 4x4, 2.5 times in bfloat16; 64 on 8x8,
# 0.75 times. Measure again: benchmarks/test_steps.py.
MIN_CHANNELS_PER_POSITION = {torch.float32: 16, torch.bfloat16: 4}


def linear_rows_gradient(x: Tensor, output_gradient: Tensor, gathered: Tensor | None, kept: Tensor | None) -> Tensor:
    """Return the selected rows of a linear layer's weight gradient, from x (N, in) and the output gradient (N, out)."""
    found = gather(output_gradient, gathered).t() @ x
    return found if kept is None else found.index_select(0, kept)


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
    rows: Tensor = found if plan.kept is None else found.index_select(0, plan.kept)
    return rows


def by_offsets(row_side: Tensor, other_side: Tensor, kernel: torch.Size, geometry: tuple[Any, ...]) -> Tensor:
    """Return the weight gradient (R, O, *kernel) of a convolution, by one matrix product for each kernel position k.

    Entry (r, o, k) is Σ over p of ``row_side[:, r, p] other_side[:, o, p stride + k dilation - padding]``.

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
    minimum = MIN_CHANNELS_PER_POSITION.get(row_side.dtype, math.inf)
    for count in row_side.shape[2:]:
        minimum = minimum * count
    return row_side.device.type == "cpu" and other_side.shape[1] >= minimum


def gather(values: Tensor, channels: Tensor | None) -> Tensor:
    """Return these channels (dim 1) of ``values``, in the memory format of ``values``; None: all."""
    if channels is None:
        return values
    last = values.movedim(1, -1)
    if last.is_contiguous():  # channels-last, or two dimensions
        flat: Tensor = torch.ops.delfast.gather_columns(last.reshape(-1, last.shape[-1]), channels)
        return flat.view(*last.shape[:-1], len(channels)).movedim(-1, 1)
    return values.index_select(1, channels)
