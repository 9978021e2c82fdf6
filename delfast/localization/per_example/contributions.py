"""The contribution of one use of a parameter to each example's gradient, without storing the gradients.

A contribution has two methods. ``add`` adds the sum over its examples of ε(g) to ``sums``. ``of(x)`` returns example
x's gradient g, for parameters whose uses must be added before ε: tied parameters, and modules that are called twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Transform = Literal["abs", "square"]  # ε(g): |g| or g²


class Contribution(Protocol):
    """The contribution of one use of one parameter."""

    def add(self, sums: Tensor, transform: Transform) -> None:
        """Add Σ_x ε(g_x) to ``sums``, in the parameter's shape, float32 (float64 for float64 parameters)."""

    def of(self, example: int) -> Tensor:
        """Return the gradient g of one example, in the parameter's shape, in float32 or wider."""


def epsilon(gradient: Tensor, transform: Transform) -> Tensor:
    """Return ε(g): |g| or g²."""
    return gradient.abs() if transform == "abs" else gradient * gradient


@functools.cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that gradients are summed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widened(t: Tensor) -> Tensor:
    """Convert to float32, or leave float64 as it is."""
    return t.to(wide(t.dtype))


def channel_dot(output_grad: Tensor, values: Tensor | None = None) -> Tensor:
    """Return (N, C): the sum over positions of ``output_grad * values``, or of ``output_grad``."""
    result: Tensor = torch.ops.delfast.channel_dot(output_grad, values)
    return result


@dataclass(frozen=True)
class Convolution:
    """The contribution to the weight of a convolution of 1 to 3 dimensions.

    inputs: (N, C, *in).
    output_grad: the output gradient, (N, M, *out).
    kernel: the weight's shape for the op, (M, C / groups, *kernel).
    shape: the parameter's shape.
    """

    inputs: Tensor
    output_grad: Tensor
    kernel: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def add(self, sums: Tensor, transform: Transform) -> None:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        sums = sums if self.kernel == self.shape else sums.view(self.kernel)
        # as for a matrix product of these; the switch's former name may not be read once the other has been set
        allow_tf32 = sums.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.ops.delfast.per_example_accumulate_(sums, self.inputs, self.output_grad, *geometry, transform, allow_tf32)

    def of(self, example: int) -> Tensor:
        output_grad = widened(self.output_grad[example : example + 1])
        inputs = self.inputs[example : example + 1].to(output_grad.dtype)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            output_grad, inputs, inputs.new_empty(1).expand(self.kernel), None, self.stride, self.padding,
            self.dilation, False, [0] * len(self.stride), self.groups, [False, True, False],
        )  # fmt: skip
        result: Tensor = gradient.reshape(self.shape)
        return result


@dataclass(frozen=True)
class Statistics:
    """The statistics by which a norm in eval mode normalizes each channel."""

    mean: Tensor
    variance: Tensor
    eps: float


@dataclass(frozen=True)
class ChannelGradients:
    """The contribution to a parameter with one element a channel: a norm's weight and bias, or any bias.

    output_grad: the output gradient, (N, C, *positions).
    values: the factors of the output gradient, of the same shape, normalized by ``statistics`` if there are any; None
        for a bias.
    """

    output_grad: Tensor
    shape: tuple[int, ...]
    values: Tensor | None = None
    statistics: Statistics | None = None

    def add(self, sums: Tensor, transform: Transform) -> None:
        self.add_with_bias([sums], transform)

    def add_with_bias(self, sums: list[Tensor], transform: Transform) -> None:
        """Add to the sums of a weight and of the bias beside it, whose gradient is Σ of the same ``output_grad``."""
        s = self.statistics
        mean, variance, eps = (None, None, 0.0) if s is None else (s.mean, s.variance, s.eps)
        torch.ops.delfast.channel_sums_(sums, self.output_grad, self.values, mean, variance, eps, transform)

    def of(self, example: int) -> Tensor:
        output_grad = widened(self.output_grad[example])
        if self.values is not None:
            values = self.values[example].to(output_grad.dtype)
            if self.statistics is not None:
                s, ones = self.statistics, [1] * (output_grad.ndim - 1)
                scale = (s.variance.to(output_grad.dtype) + s.eps).rsqrt()
                values = (values - s.mean.to(output_grad.dtype).view(-1, *ones)) * scale.view(-1, *ones)
            output_grad = output_grad * values
        return (output_grad if output_grad.ndim == 1 else output_grad.flatten(1).sum(dim=1)).reshape(self.shape)


@dataclass(frozen=True)
class Gradients:
    """The contribution to a small parameter by its per-example gradients in full: (N, *shape of the parameter)."""

    gradients: Tensor

    def add(self, sums: Tensor, transform: Transform) -> None:
        sums += epsilon(widened(self.gradients), transform).sum(dim=0)

    def of(self, example: int) -> Tensor:
        return widened(self.gradients[example])


@dataclass(frozen=True)
class Lookup:
    """The contribution to an embedding's table: indices (N, T), output_grad (N, T, D). Memory grows with N T."""

    indices: Tensor
    output_grad: Tensor
    shape: tuple[int, ...]
    padding_idx: int | None
    by_frequency: bool

    def add(self, sums: Tensor, transform: Transform) -> None:
        rows, gradients = self._rows(self.indices, self.output_grad)
        sums.index_add_(0, rows, epsilon(gradients, transform))

    def of(self, example: int) -> Tensor:
        rows, gradients = self._rows(self.indices[example : example + 1], self.output_grad[example : example + 1])
        return gradients.new_zeros(self.shape).index_add_(0, rows, gradients)

    def _rows(self, indices: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table's row, and the gradient, of every (example, row) pair that occurs.

        There are N T of both, whatever occurs, so that nothing is read from the device: the rest has row 0, gradient 0.
        """
        table = self.shape[0]
        example = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
        pairs, order = (example * table + indices).flatten().sort()
        is_new = torch.ones_like(pairs, dtype=torch.bool)
        is_new[1:] = pairs[1:] != pairs[:-1]
        position = is_new.cumsum(0) - 1  # of the pair among those that occur
        output_grad = widened(output_grad).flatten(0, 1)[order]
        gradients = torch.zeros_like(output_grad).index_add_(0, position, output_grad)
        rows = torch.zeros_like(pairs).scatter_(0, position, pairs % table)
        if self.by_frequency:  # as for a batch of this example alone
            counts = gradients.new_zeros(len(pairs)).index_add_(0, position, gradients.new_ones(len(pairs)))
            gradients /= counts.clamp(min=1).unsqueeze(1)
        if self.padding_idx is not None:
            gradients = gradients.masked_fill((rows == self.padding_idx).unsqueeze(1), 0)
        return rows, gradients
