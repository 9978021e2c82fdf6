"""Linear layers: torch's, ``addmm``, and the functions that ``delfast.register_layer`` is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.layer_types import register_rule
from delfast.localization.per_example.contributions import Contribution, Convolution
from delfast.localization.per_example.layers import BatchAxis, Call, LayerRule
from delfast.ops.layout import channels_first


class Linear(LayerRule):
    """The rule of a linear layer on (*, features): a convolution of kernel size 1 over an example's positions."""

    is_channelwise = True

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim) - 1

    def channel_dim(self, ndim: int) -> int:
        return ndim - 1

    def output_grad_by_channel(self, call: Call, output_grad: Tensor, axis: BatchAxis) -> Tensor:
        return axis.by_channel(output_grad, trailing=1)

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution:
        return _products(axis, inputs, output_grad, call)


class TransposedLinear(Linear):
    """The rule of a linear layer with a weight (in, out): inputs and output gradient are exchanged."""

    output_dim = 1

    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution:
        return _products(axis, output_grad, inputs, call)


class Addmm(TransposedLinear):
    """The rule of ``torch.addmm(bias, input, weight)`` with input (N, in), weight (in, out) and bias (out,)."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        names = ("input", "mat1", "mat2")
        others = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [others.pop(name, None) for name in names]
        is_plain = len(args) <= len(names) and others.keys() <= {"beta", "alpha"} and {*others.values()} <= {1}
        if not is_plain or not all(isinstance(t, Tensor) for t in tensors):
            tensors = [None] * len(names)  # scaled, or the form (beta, input, alpha, mat1, mat2): no rule
        return dict(zip(("bias", "input", "weight"), tensors, strict=True))

    def leading(self, call: Call) -> int:
        return int(call["weight"] is not None and call["bias"].shape == call["weight"].shape[1:])

    def compute(self, function: Callable[..., Tensor], call: Call) -> Tensor:
        if call["bias"] is None:  # the output before the bias
            return torch.mm(call["input"], call["weight"])
        return function(call["bias"], call["input"], call["weight"])


class _Registered(Linear):
    """The rule of a user's function(input, weight, bias); see ``delfast.register_layer``."""

    def leading(self, call: Call) -> int:
        known = isinstance(call.get("input"), Tensor) and isinstance(call.get("weight"), Tensor)
        return super().leading(call) if known and set(call) <= set(self.arguments) else 0

    def compute(self, function: Callable[..., Tensor], call: Call) -> Tensor:
        bias = [] if call["bias"] is None else [call["bias"]]
        return function(call["input"], call["weight"], *bias)

    def mismatch(self, call: Call, inputs: Tensor, output: Tensor) -> str | None:
        with torch.no_grad():
            expected = functional.linear(inputs, channels_first(call["weight"], self.output_dim), call["bias"])
        # a tolerance of 1 %: far above the rounding of 16-bit floats
        output = output.detach().to(expected.dtype)  # autocast may convert one of the two
        if output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-2, atol=1e-2):
            return None
        return (
            f"input times weight plus bias with the outputs along dim {self.output_dim}, it computes something else; "
            "correct output_dim, or register the layer without function"
        )


class _RegisteredTransposed(_Registered, TransposedLinear):
    """The rule of a user's function with a weight (in, out)."""


def _products(axis: BatchAxis, columns: Tensor, rows: Tensor, call: Call) -> Contribution:
    """Return the contribution to a weight: the product of ``rows`` for its rows and ``columns``, both (*, F)."""
    shape = tuple(call["weight"].shape)
    parts = [axis.by_channel(t, trailing=1) for t in (columns, rows)]
    inputs, output_grad = (t.unsqueeze(2) if t.ndim == 2 else t for t in parts)
    return Convolution(inputs, output_grad, (*shape, 1), shape, (1,), (0,), (1,), 1)


REGISTERED = (_Registered(), _RegisteredTransposed())  # by output_dim
register_rule(Linear(), functional.linear)
register_rule(Addmm(), torch.addmm, torch.Tensor.addmm)
