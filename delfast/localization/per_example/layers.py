"""The axis of the examples, and what a layer rule is: what the inputs and output gradients of a layer contribute.

A layer is identified by the function that computes it (``torch.conv2d``, ``functional.layer_norm``), not by its module.
So functional calls, subclasses and the projections inside ``MultiheadAttention`` have a rule too. The rules are in
``rules``, one file for each family of layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.localization.per_example.contributions import ChannelGradients, Contribution

Call = dict[str, Any]  # the arguments of one call, by name


@dataclass(frozen=True, order=True)
class ExampleAxis:
    """The axis of a layer's output along which the examples lie, ``dim``, with k slices of each example.

    The slices of an example are adjacent, x₀ x₀ x₁ x₁ (windows, frames), or ``interleaved``, x₀ x₁ x₀ x₁ (torch's
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
        if self.along.dim == 0 and t.shape[0] == self.examples:  # the usual case, without a view for each step
            if trailing is None:
                return t
            t = t if trailing == 1 else t.flatten(-trailing)
            return t if t.ndim == 2 else (t if t.ndim == 3 else t.flatten(1, -2)).transpose(1, 2)
        t = self.split(t)
        if trailing is not None:
            return t.flatten(-trailing).flatten(1, -2).transpose(1, 2)
        return t.squeeze(1) if t.shape[1] == 1 else t.transpose(1, 2)


class LayerRule(ABC):
    """The rule of a layer function with a ``weight`` and optionally a ``bias``."""

    arguments: tuple[str, ...] = ("input", "weight", "bias")
    defaults: Mapping[str, Any] = MappingProxyType({"bias": None})
    is_channelwise = False  # true for convolutions and linear layers, whose rows have signed channel sums
    rows_are_inputs = False  # true for transposed convolutions, whose rows are input channels
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

    def channel_dim(self, ndim: int) -> int:
        """Return the dim of a channelwise layer's output, of ``ndim`` dims, along which its rows lie."""
        return 1

    @abstractmethod
    def weight(self, call: Call, inputs: Tensor, output_grad: Tensor, axis: BatchAxis) -> Contribution | None:
        """Return the weight's contribution; None if the rule does not support examples along ``axis``."""

    def output_grad_by_channel(self, call: Call, output_grad: Tensor, axis: BatchAxis) -> Tensor:
        """Reshape ``output_grad`` to (N, C, *positions), with C the elements of the bias."""
        return axis.by_channel(output_grad)

    def bias(self, call: Call, output_grad: Tensor, axis: BatchAxis) -> Contribution:
        """Return the bias's contribution."""
        return ChannelGradients(self.output_grad_by_channel(call, output_grad, axis), tuple(call["bias"].shape))


def refuse_batch_statistics(named_modules: Any) -> None:
    """Raise InputError for a BatchNorm without running statistics, which mixes the examples in eval mode too."""
    for name, module in named_modules:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"'{name}' normalizes by the statistics of the batch, so that no example has a gradient of its own; "
                "give it running statistics (track_running_stats=True) or use per_example=False"
            )
