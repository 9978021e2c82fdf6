"""Convolutions and transposed convolutions of 1 to 3 dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.layer_types import register_rule
from delfast.localization.per_example.contributions import Contribution, Convolution
from delfast.localization.per_example.layers import BatchAxis, Call, LayerRule


class Conv(LayerRule):
    """The rule of a convolution of ``dims`` dimensions. k > 1 images per example become one more, of kernel size 1."""

    arguments: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = MappingProxyType({"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    is_channelwise = True

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def leading(self, call: Call) -> int:
        return 1 if call["input"].ndim == self.dims + 2 else 0

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution | None:
        dilation = self._per_dim(call["dilation"])
        padding, extra = self._padding(call["padding"], dilation, call["weight"].shape[2:])
        if any(extra):  # padding 'same' with an even kernel adds one more at the end
            inputs = functional.pad(inputs, [side for more in reversed(extra) for side in (0, more)])
        return self._convolution(call, inputs, output_grad, axis, padding, dilation)

    def _convolution(
        self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis, padding: tuple[int, ...], dilation: Any
    ) -> Contribution | None:
        shape, stride = tuple(call["weight"].shape), self._per_dim(call["stride"])
        inputs, output_grad, kernel = axis.by_channel(inputs), axis.by_channel(output_grad), shape
        if inputs.ndim > self.dims + 2:
            if self.dims == 3:
                return None  # the op has no convolution of four dimensions
            kernel = (*shape[:2], 1, *shape[2:])
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        return Convolution(inputs, output_grad, kernel, shape, stride, padding, dilation, call["groups"])

    def _per_dim(self, value: int | Sequence[int]) -> tuple[int, ...]:
        if isinstance(value, int):
            return (value,) * self.dims
        return tuple(value) if len(value) == self.dims else tuple(value) * self.dims

    def _padding(
        self, padding: Any, dilation: tuple[int, ...], kernel: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the padding of both sides, and the additional padding at the end."""
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            return tuple(t // 2 for t in total), tuple(t % 2 for t in total)
        return self._per_dim(0 if padding == "valid" else padding), (0,) * self.dims


class TransposedConv(Conv):
    """The rule of a transposed convolution: inputs and output gradient are exchanged, and rows are input channels."""

    arguments = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    rows_are_inputs = True
    defaults = MappingProxyType({**Conv.defaults, "output_padding": 0})

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution | None:
        stride = self._per_dim(call["stride"])
        extra = [op // s for op, s in zip(self._per_dim(call["output_padding"]), stride, strict=True)]
        if any(extra):  # the convolution of this output gradient has more outputs than there are inputs
            inputs = functional.pad(inputs, [side for more in reversed(extra) for side in (0, more)])
        padding, dilation = self._per_dim(call["padding"]), self._per_dim(call["dilation"])
        return self._convolution(call, output_grad, inputs, axis, padding, dilation)


for dims, functions in enumerate(
    (
        (torch.conv1d, torch.conv_transpose1d),
        (torch.conv2d, torch.conv_transpose2d),
        (torch.conv3d, torch.conv_transpose3d),
    ),
    start=1,
):
    register_rule(Conv(dims), functions[0])
    register_rule(TransposedConv(dims), functions[1])
