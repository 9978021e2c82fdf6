"""The rules of layer functions: one per function, for what its inputs and output gradients contribute.

A layer is identified by the function that computes it (``torch.conv2d``, ``functional.layer_norm``), not by its module.
So functional calls, subclasses and the projections inside ``MultiheadAttention`` have a rule too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delfast.errors import InputError
from delfast.layer_types import as_linear, registered_functions
from delfast.localization.per_example.contributions import (
    Contribution,
    Convolution,
    Gradients,
    Lookup,
    channel_dot,
    widened,
)

Call = dict[str, Any]  # the arguments of one call, by name


@dataclass(frozen=True, order=True)
class ExampleAxis:
    """The axis of a layer's output along which the examples lie, ``dim``, with k entries of each example.

    The entries of an example are adjacent, x₀ x₀ x₁ x₁ (windows, frames), or ``interleaved``, x₀ x₁ x₀ x₁ (torch's
    attention).
    """

    dim: int = 0
    interleaved: bool = False

    def split(self, t: Tensor, examples: int) -> Tensor:
        """Reshape to (examples, k, *the other dims): a view where the strides allow it."""
        t = t.movedim(self.dim, 0)
        each = t.shape[0] // examples
        if self.interleaved:
            return t.reshape(each, examples, *t.shape[1:]).transpose(0, 1)
        return t.reshape(examples, each, *t.shape[1:])


@dataclass(frozen=True)
class BatchAxis:
    """The example axis of a batch: ``examples`` examples ``along`` an axis."""

    along: ExampleAxis
    examples: int

    def split(self, t: Tensor) -> Tensor:
        return self.along.split(t, self.examples)

    def by_channel(self, t: Tensor, trailing: int | None = None) -> Tensor:
        """Reshape to (examples, C, *positions). C is the dim after the axis, or the last ``trailing`` dims as one."""
        t = self.split(t)
        if trailing is not None:
            return t.flatten(-trailing).flatten(1, -2).transpose(1, 2)
        return t.squeeze(1) if t.shape[1] == 1 else t.transpose(1, 2)


class LayerRule(ABC):
    """The rule of a layer function with a ``weight`` and optionally a ``bias``."""

    arguments: tuple[str, ...] = ("input", "weight", "bias")
    defaults: Mapping[str, Any] = MappingProxyType({"bias": None})
    is_channelwise = False  # true for convolutions and linear layers, whose rows have signed channel sums
    output_dim = 0  # the dim of a channelwise layer's weight whose slices are the rows

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Return the arguments by name, with defaults."""
        return {**self.defaults, **dict(zip(self.arguments, args, strict=False)), **kwargs}

    def compute(self, function: Callable[..., Tensor], call: Call) -> Tensor:
        """Call the layer function with the arguments of ``call``."""
        return function(**{name: value for name, value in call.items() if name in self.arguments})

    def mismatch(self, call: Call, inputs: Tensor, output: Tensor) -> str | None:
        """Return the expected output if a registered function computes another one; else None."""
        return None

    def refusal(self, call: Call) -> str | None:
        """Return why this call and everything before it have no per-example gradients; None if they have."""
        return None

    @abstractmethod
    def leading(self, call: Call) -> int:
        """Return the number of leading dims along which the output's examples may lie; 0 for a call without a rule."""

    @abstractmethod
    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution | None:
        """Return the weight's contribution; None if the rule does not support examples along ``axis``."""

    def channel_deltas(self, call: Call, deltas: Tensor, axis: BatchAxis) -> Tensor:
        """Reshape ``deltas`` to (N, C, *positions), with C the elements of the bias."""
        return axis.by_channel(deltas)

    def bias(self, call: Call, deltas: Tensor, axis: BatchAxis) -> Contribution:
        sums = channel_dot(self.channel_deltas(call, deltas, axis))
        return Gradients(sums.reshape(axis.examples, *call["bias"].shape))


class Linear(LayerRule):
    """The rule of a linear layer on (*, features): a convolution of kernel size 1 over an example's positions."""

    is_channelwise = True

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim) - 1

    def channel_deltas(self, call: Call, deltas: Tensor, axis: BatchAxis) -> Tensor:
        return axis.by_channel(deltas, trailing=1)

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution:
        shape = tuple(call["weight"].shape)
        return Convolution(
            axis.by_channel(inputs, trailing=1), axis.by_channel(deltas, trailing=1), (*shape, 1), shape,
            (1,), (0,), (1,), 1,
        )  # fmt: skip


class TransposedLinear(Linear):
    """The rule of a linear layer with a weight (in, out): inputs and deltas are exchanged."""

    output_dim = 1

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution:
        shape = tuple(call["weight"].shape)
        return Convolution(
            axis.by_channel(deltas, trailing=1), axis.by_channel(inputs, trailing=1), (*shape, 1), shape,
            (1,), (0,), (1,), 1,
        )  # fmt: skip


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
            expected = functional.linear(inputs, as_linear(call["weight"], self.output_dim), call["bias"])
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


class Conv(LayerRule):
    """The rule of a convolution of ``dims`` dimensions. k > 1 images per example become one more, of kernel size 1."""

    arguments: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = MappingProxyType({"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    is_channelwise = True

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def leading(self, call: Call) -> int:
        return 1 if call["input"].ndim == self.dims + 2 else 0

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution | None:
        dilation = self._per_dim(call["dilation"])
        padding, extra = self._padding(call["padding"], dilation, call["weight"].shape[2:])
        if any(extra):  # padding 'same' with an even kernel adds one more at the end
            inputs = functional.pad(inputs, [side for more in reversed(extra) for side in (0, more)])
        return self._convolution(call, inputs, deltas, axis, padding, dilation)

    def _convolution(
        self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis, padding: tuple[int, ...], dilation: Any
    ) -> Contribution | None:
        shape, stride = tuple(call["weight"].shape), self._per_dim(call["stride"])
        inputs, deltas, kernel = axis.by_channel(inputs), axis.by_channel(deltas), shape
        if inputs.ndim > self.dims + 2:
            if self.dims == 3:
                return None  # the op has no convolution of four dimensions
            kernel = (*shape[:2], 1, *shape[2:])
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        return Convolution(inputs, deltas, kernel, shape, stride, padding, dilation, call["groups"])

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
    """The rule of a transposed convolution: inputs and deltas are exchanged, and rows are input channels."""

    arguments = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = MappingProxyType({**Conv.defaults, "output_padding": 0})

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution | None:
        stride = self._per_dim(call["stride"])
        extra = [op // s for op, s in zip(self._per_dim(call["output_padding"]), stride, strict=True)]
        if any(extra):  # the convolution of these deltas has more outputs than there are inputs
            inputs = functional.pad(inputs, [side for more in reversed(extra) for side in (0, more)])
        padding, dilation = self._per_dim(call["padding"]), self._per_dim(call["dilation"])
        return self._convolution(call, deltas, inputs, axis, padding, dilation)


class Norm(LayerRule):
    """The rule of a normalization per channel (dim 1): the weight gradient is Σ over positions of δ × its output."""

    def __init__(self, function: Callable[..., Tensor], *arguments: str, **defaults: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.defaults = {"weight": None, "bias": None, **defaults}

    def leading(self, call: Call) -> int:
        return 1

    def refusal(self, call: Call) -> str | None:
        if call.get("training"):
            return "normalizes by the statistics of the batch, so that no example has a gradient of its own"
        return None

    def trailing(self, call: Call) -> int | None:
        return None

    def channel_deltas(self, call: Call, deltas: Tensor, axis: BatchAxis) -> Tensor:
        return axis.by_channel(deltas, self.trailing(call))

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution:
        plain = {name: widened(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        plain |= {"input": widened(inputs), "weight": None, "bias": None}
        with torch.autocast(inputs.device.type, enabled=False):
            normalized = self.function(**{name: plain[name] for name in self.arguments if name in plain})
        sums = channel_dot(
            self.channel_deltas(call, widened(deltas), axis), axis.by_channel(normalized, self.trailing(call))
        )
        return Gradients(sums.reshape(axis.examples, *call["weight"].shape))


class TrailingNorm(Norm):
    """The rule of a normalization over the last dims (LayerNorm, RMSNorm). The dims before them are positions."""

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim) - self.trailing(call)

    def trailing(self, call: Call) -> int:
        return len(call["normalized_shape"])


class Embedding(LayerRule):
    """The rule of an embedding, which reads a row of the table per index."""

    arguments = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    defaults = MappingProxyType({"bias": None, "padding_idx": None, "max_norm": None, "scale_grad_by_freq": False})

    def refusal(self, call: Call) -> str | None:
        return "changes its weights as it reads them (max_norm)" if call["max_norm"] is not None else None

    def leading(self, call: Call) -> int:
        return int(call["input"].ndim)

    def weight(self, call: Call, inputs: Tensor, deltas: Tensor, axis: BatchAxis) -> Contribution:
        shape, padding_idx = tuple(call["weight"].shape), call["padding_idx"]
        if padding_idx is not None and padding_idx < 0:
            padding_idx += shape[0]
        indices, deltas = axis.split(inputs).flatten(1), axis.split(deltas).flatten(1, -2)
        return Lookup(indices, deltas, shape, padding_idx, bool(call["scale_grad_by_freq"]))


RULES: dict[Any, LayerRule] = {
    functional.linear: Linear(),
    torch.addmm: Addmm(),
    torch.Tensor.addmm: Addmm(),
    torch.conv1d: Conv(1),
    torch.conv2d: Conv(2),
    torch.conv3d: Conv(3),
    torch.conv_transpose1d: TransposedConv(1),
    torch.conv_transpose2d: TransposedConv(2),
    torch.conv_transpose3d: TransposedConv(3),
    functional.embedding: Embedding(),
    functional.batch_norm: Norm(
        functional.batch_norm, "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    ),
    functional.instance_norm: Norm(
        functional.instance_norm,
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        running_mean=None,
        running_var=None,
    ),
    functional.group_norm: Norm(functional.group_norm, "input", "num_groups", "weight", "bias", "eps"),
    functional.layer_norm: TrailingNorm(functional.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    functional.rms_norm: TrailingNorm(functional.rms_norm, "input", "normalized_shape", "weight", "eps"),
}


def layer_rules() -> dict[Any, LayerRule]:
    """Return ``RULES`` and the rules of the functions registered by ``delfast.register_layer``."""
    registered = (_Registered(), _RegisteredTransposed())
    return {function: registered[dim] for function, dim in registered_functions().items()} | RULES


def refuse_batch_statistics(named_modules: Any) -> None:
    """Raise InputError for a BatchNorm without running statistics, which mixes the examples in eval mode too."""
    for name, module in named_modules:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"'{name}' normalizes by the statistics of the batch, so that no example has a gradient of its own; "
                "give it running statistics (track_running_stats=True) or use per_example=False"
            )
