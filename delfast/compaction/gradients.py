"""Weight gradients of the selected rows alone: less of the arithmetic, in the form that the library is fastest at."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.compaction.plan import RowPlan

convolution_backward = torch.ops.aten.convolution_backward.default

# With so many channels or more for each position of a feature map, a product for each position of the kernel beats
# oneDNN's weight gradient; channels of the tensor that is not the rows': the input, of a transposed convolution the
# output. Measured on two cores with AMX: 512 channels on maps of 4x4, 1.1 to 1.2 times in float32 and 4 times in
# bfloat16; 256 on 8x8, 0.6 and 1.5 times; 128 on 4x4, 2.5 times in bfloat16; 64 on 8x8, 0.75 times.
MIN_CHANNELS_PER_POSITION = {torch.float32: 16, torch.bfloat16: 4}


def linear_rows_gradient(x: Tensor, delta: Tensor, gathered: Tensor | None, kept: Tensor | None) -> Tensor:
    """The gradient of the selected rows of a linear layer's weight, of x (N, in) and delta (N, out)."""
    found = gather(delta, gathered).t() @ x
    return found if kept is None else found.index_select(0, kept)


def convolution_rows_gradient(
    x: Tensor, delta: Tensor, weight: Tensor, plan: RowPlan, geometry: tuple[Any, ...]
) -> Tensor:
    """The same of a convolution; geometry: stride, padding, dilation, transposed, output padding."""
    transposed = geometry[3]
    small_x = gather(x, plan.gathered if transposed else plan.opposite)
    small_delta = gather(delta, plan.opposite if transposed else plan.gathered)
    of_rows, others = (small_x, small_delta) if transposed else (small_delta, small_x)
    if plan.groups == 1 and _is_small_map(of_rows, others):
        found = by_offsets(of_rows, others, weight.shape[2:], geometry)
    else:
        like = weight.narrow(0, 0, of_rows.shape[1])  # only its shape is looked at
        _, found, _ = convolution_backward(
            small_delta, small_x, like, None, *geometry, plan.groups, [False, True, False]
        )
    rows: Tensor = found if plan.kept is None else found.index_select(0, plan.kept)
    return rows


def by_offsets(of_rows: Tensor, others: Tensor, kernel: torch.Size, geometry: tuple[Any, ...]) -> Tensor:
    """Σ over p of ``of_rows[:, r, p] others[:, o, p stride + k dilation - padding]``, for r and o in the first two
    dimensions of the result, and k in the others: the weight gradient, as a product for each k.

    of_rows: (N, R, positions ...), of a convolution its output gradient, of a transposed one its input; others:
    (N, O, ...), the other of the two; kernel: its extents; geometry: as in ``convolution_rows_gradient``.
    """
    stride, padding, dilation, *_ = geometry
    left = of_rows.movedim(1, -1).reshape(-1, of_rows.shape[1]).t()
    padded = functional.pad(others.movedim(1, -1), [0, 0, *(p for p in reversed(padding) for _ in range(2))])
    found = of_rows.new_empty(of_rows.shape[1], *kernel, others.shape[1])
    with torch.autocast(of_rows.device.type, enabled=False):  # which would round a product, but not a convolution
        for offset in itertools.product(*map(range, kernel)):
            window: tuple[slice, ...] = (slice(None),)
            for k, d, s, count in zip(offset, dilation, stride, of_rows.shape[2:], strict=True):
                window += (slice(k * d, k * d + (count - 1) * s + 1, s),)
            at: tuple[slice | int, ...] = (slice(None), *offset)
            found[at] = left @ padded[window].reshape(-1, others.shape[1])
    return found.movedim(-1, 1)


def _is_small_map(of_rows: Tensor, others: Tensor) -> bool:
    minimum = MIN_CHANNELS_PER_POSITION.get(of_rows.dtype, math.inf)
    for count in of_rows.shape[2:]:
        minimum = minimum * count
    return of_rows.device.type == "cpu" and others.shape[1] >= minimum


def gather(values: Tensor, channels: Tensor | None) -> Tensor:
    """``values`` with only these channels (dim 1), in its own memory format; None: as it is."""
    if channels is None:
        return values
    last = values.movedim(1, -1)
    if last.is_contiguous():  # channels-last, or two dimensions
        flat: Tensor = torch.ops.delfast.gather_columns(last.reshape(-1, last.shape[-1]), channels)
        return flat.view(*last.shape[:-1], len(channels)).movedim(-1, 1)
    return values.index_select(1, channels)
