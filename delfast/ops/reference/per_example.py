"""Reference of csrc/cpu/per_example: sums over examples of functions of each example's weight gradient.

Examples are dim 0 of ``inputs`` and ``output_grad``. A layer's ``output_grad`` is its output gradient for the *sum* of
the examples' losses, so slice x is the output gradient of example x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_example_accumulate_(
    sums: Tensor,
    inputs: Tensor,
    output_grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transform: str,
    allow_tf32: bool = False,
) -> None:
    """Add the sum over examples of ``|g_x|`` or ``g_x²`` to ``sums``, with g_x the weight gradient of example x.

    The layer is a convolution of 1 to 3 spatial dimensions. A linear layer on (N, T, features) is a convolution over T
    with a kernel of 1. For a transposed convolution, swap ``inputs`` and ``output_grad``.

    Parameters
    ----------
    sums : Tensor
        Changed in place: (M, C / groups, *kernel), the weight's shape; float32 or float64, the dtype of computation.
    inputs : Tensor
        The layer's inputs (N, C, *in).
    output_grad : Tensor
        The layer's output gradients (N, M, *out).
    stride : sequence of int
        The layer's stride in each spatial dimension.
    padding : sequence of int
        The layer's zero padding in each spatial dimension.
    dilation : sequence of int
        The layer's dilation in each spatial dimension.
    groups : int
        The layer's groups.
    transform : {"abs", "square"}
        Whether to add ``|g_x|`` or ``g_x²``.
    allow_tf32 : bool
        Whether the CUDA kernel may round operands in float32 to tf32, which have 10 bits of mantissa. The reference
        leaves that to ``torch.backends``.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> sums, inputs = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [2.0]], [[-1.0], [0.0]]])
    >>> torch.ops.delfast.per_example_accumulate_(sums, inputs, torch.ones(2, 1, 1), [1], [0], [1], 1, "abs")
    >>> sums.flatten()
    tensor([2., 2.])
    """
    if not (inputs.numel() and output_grad.numel() and sums.numel()):
        # nothing to add, but the kernels increment the version counter in this case too
        torch.autograd.graph.increment_version(sums)
        return
    wide, dims = sums.dtype, len(stride)
    weight = inputs.new_empty(1, dtype=wide).expand(sums.shape)  # only its shape is used
    for x in range(inputs.shape[0]):
        _, gradient, _ = torch.ops.aten.convolution_backward(
            output_grad[x : x + 1].to(wide), inputs[x : x + 1].to(wide), weight, None, stride, padding, dilation,
            False, [0] * dims, groups, [False, True, False],
        )  # fmt: skip
        sums += gradient.abs() if transform == "abs" else gradient * gradient


def channel_dot(output_grad: Tensor, values: Tensor | None) -> Tensor:
    """Sum ``output_grad * values`` over the positions of each example and channel.

    Parameters
    ----------
    output_grad : Tensor
        Output gradients (N, C, *positions).
    values : Tensor or None
        Tensor of the same shape; None sums ``output_grad``.

    Returns
    -------
    Tensor
        Sums (N, C), computed in float32, or in float64 for float64 ``output_grad``.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> torch.ops.delfast.channel_dot(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]))
    tensor([[11.]])
    """
    wide = torch.promote_types(output_grad.dtype, torch.float32)
    product = output_grad.to(wide) if values is None else output_grad.to(wide) * values.to(wide)
    return product.flatten(2).sum(dim=2) if output_grad.ndim > 2 else product.clone()


def channel_sums_(
    sums: Sequence[Tensor],
    output_grad: Tensor,
    values: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    transform: str,
) -> None:
    """Add the sum over examples of ``|g_x|`` or ``g_x²`` to ``sums``, for the gradients of a norm's weight and bias.

    For channel c, the weight's gradient is Σ_t δ (v - mean) / sqrt(variance + eps) and the bias's is Σ_t δ, over the
    positions t of example x, with δ the output gradient.

    Parameters
    ----------
    sums : sequence of Tensor
        Changed in place, C elements each, float32 or float64, the dtype of computation: those of the weight, if
        ``values`` are given, then those of the bias; either may be left out.
    output_grad : Tensor
        Output gradients (N, C, *positions).
    values : Tensor or None
        Tensor of the same shape, by which the output gradient is multiplied; None adds up the bias's gradient alone.
    mean : Tensor or None
        The mean of each channel's values (C,); None if the values are normalized already.
    variance : Tensor or None
        The variance of each channel's values (C,); given together with ``mean``.
    eps : float
        The number added to the variance.
    transform : {"abs", "square"}
        Whether to add ``|g_x|`` or ``g_x²``.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> weight, bias = torch.zeros(1), torch.zeros(1)
    >>> output_grad, values = torch.tensor([[[1.0, 1.0]], [[-1.0, 0.0]]]), torch.tensor([[[3.0, 4.0]], [[5.0, 6.0]]])
    >>> torch.ops.delfast.channel_sums_([weight, bias], output_grad, values, None, None, 0.0, "abs")
    >>> weight, bias
    (tensor([12.]), tensor([3.]))
    """
    wide = sums[0].dtype
    output_grad = output_grad.to(wide)
    gradients = []
    if values is not None:
        values = values.to(wide)
        if mean is not None:
            values = values - mean.to(wide).view(-1, *[1] * (output_grad.ndim - 2))
        product = output_grad * values
        gradients.append(product.flatten(2).sum(dim=2) if output_grad.ndim > 2 else product)
        if variance is not None:
            gradients[0] = gradients[0] * (variance.to(wide) + eps).rsqrt()
    if len(sums) > len(gradients):
        gradients.append(output_grad.flatten(2).sum(dim=2) if output_grad.ndim > 2 else output_grad)
    for total, gradient in zip(sums, gradients, strict=True):
        total += (gradient.abs() if transform == "abs" else gradient * gradient).sum(dim=0).view(total.shape)
