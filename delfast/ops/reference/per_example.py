"""Reference of csrc/cpu/per_example: sums over examples of what each example's own gradient contributes.

Examples are dim 0 of ``inputs`` and ``deltas``; a layer's ``deltas`` are the gradient of the *sum* of the examples'
losses with respect to its output, so that slice x of them is example x's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_example_accumulate_(
    sums: Tensor,
    inputs: Tensor,
    deltas: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    epilogue: str,
) -> None:
    """``sums += Σ_x ε(g_x)``, with g_x the weight gradient of example x alone, ε "abs" |g| or "square" g².

    inputs (N, C, *in), deltas (N, M, *out): what a convolution of 1 to 3 spatial dimensions read, and the gradient of
    what it wrote. sums (M, C / groups, *kernel): like its weight; float32 or float64, in which all is computed.
    Linear on (N, T, features): a convolution over T of kernel 1. Transposed convolution: deltas and inputs swapped.
    """
    if not (inputs.numel() and deltas.numel() and sums.numel()):
        # nothing to add; the kernels count that as a change too
        torch.autograd.graph.increment_version(sums)
        return
    wide, dims = sums.dtype, len(stride)
    weight = inputs.new_empty(1, dtype=wide).expand(sums.shape)  # only its shape is looked at
    for x in range(inputs.shape[0]):
        _, gradient, _ = torch.ops.aten.convolution_backward(
            deltas[x : x + 1].to(wide), inputs[x : x + 1].to(wide), weight, None, stride, padding, dilation,
            False, [0] * dims, groups, [False, True, False],
        )  # fmt: skip
        sums += gradient.abs() if epilogue == "abs" else gradient * gradient


def channel_dot(deltas: Tensor, values: Tensor | None) -> Tensor:
    """(N, C): Σ over positions of ``deltas * values`` for each example and channel; of ``deltas`` alone without values.

    deltas, values: (N, C, *positions). Computed and returned in float32, or float64 for float64 deltas.
    """
    wide = torch.promote_types(deltas.dtype, torch.float32)
    product = deltas.to(wide) if values is None else deltas.to(wide) * values.to(wide)
    return product.flatten(2).sum(dim=2) if deltas.ndim > 2 else product.clone()
