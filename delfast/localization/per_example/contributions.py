"""The contribution of one use of a parameter to each example's gradient, without storing the gradients.

A contribution has two methods. ``add`` adds the sum over its examples of ε(g) to ``sums``. ``of(x)`` returns example
x's gradient g, for parameters whose uses must be added before ε: tied parameters, and modules that are called twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Epilogue = Literal["abs", "square"]  # ε(g): |g| or g²


class Contribution(Protocol):
    """The contribution of one use of one parameter."""

    def add(self, sums: Tensor, epilogue: Epilogue) -> None:
        """Add Σ_x ε(g_x) to ``sums``, in the parameter's shape, float32 (float64 for float64 parameters)."""

    def of(self, example: int) -> Tensor:
        """Return the gradient g of one example, in the parameter's shape, in float32 or wider."""


def epsilon(gradient: Tensor, epilogue: Epilogue) -> Tensor:
    """Return ε(g): |g| or g²."""
    return gradient.abs() if epilogue == "abs" else gradient * gradient


def widened(t: Tensor) -> Tensor:
    """Convert to float32, or leave float64 as it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def channel_dot(deltas: Tensor, values: Tensor | None = None) -> Tensor:
    """Return (N, C): the sum over positions of ``deltas * values``, or of ``deltas``."""
    result: Tensor = torch.ops.delfast.channel_dot(deltas, values)
    return result


@dataclass(frozen=True)
class Convolution:
    """The contribution to the weight of a convolution of 1 to 3 dimensions: inputs (N, C, *in), deltas (N, M, *out).

    ``kernel``: the weight's shape for the op, (M, C / groups, *kernel). ``shape``: the parameter's shape.
    """

    inputs: Tensor
    deltas: Tensor
    kernel: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def add(self, sums: Tensor, epilogue: Epilogue) -> None:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        torch.ops.delfast.per_example_accumulate_(sums.view(self.kernel), self.inputs, self.deltas, *geometry, epilogue)

    def of(self, example: int) -> Tensor:
        deltas = widened(self.deltas[example : example + 1])
        inputs = self.inputs[example : example + 1].to(deltas.dtype)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            deltas, inputs, inputs.new_empty(1).expand(self.kernel), None, self.stride, self.padding, self.dilation,
            False, [0] * len(self.stride), self.groups, [False, True, False],
        )  # fmt: skip
        result: Tensor = gradient.reshape(self.shape)
        return result


@dataclass(frozen=True)
class Gradients:
    """The contribution to a small parameter by its per-example gradients in full: (N, *shape of the parameter)."""

    gradients: Tensor

    def add(self, sums: Tensor, epilogue: Epilogue) -> None:
        sums += epsilon(widened(self.gradients), epilogue).sum(dim=0)

    def of(self, example: int) -> Tensor:
        return widened(self.gradients[example])


@dataclass(frozen=True)
class Lookup:
    """The contribution to an embedding's table: indices (N, T), deltas (N, T, D). Memory grows with the rows used."""

    indices: Tensor
    deltas: Tensor
    shape: tuple[int, ...]
    padding_idx: int | None
    by_frequency: bool

    def add(self, sums: Tensor, epilogue: Epilogue) -> None:
        rows, gradients = self._rows(self.indices, self.deltas)
        sums.index_add_(0, rows, epsilon(gradients, epilogue))

    def of(self, example: int) -> Tensor:
        rows, gradients = self._rows(self.indices[example : example + 1], self.deltas[example : example + 1])
        return gradients.new_zeros(self.shape).index_add_(0, rows, gradients)

    def _rows(self, indices: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table's row, and the gradient (U, D), of every (example, row) pair that occurs."""
        table = self.shape[0]
        example = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
        pairs, position, counts = torch.unique(
            (example * table + indices).flatten(), return_inverse=True, return_counts=True
        )
        deltas = widened(deltas).flatten(0, 1)
        gradients = deltas.new_zeros(len(pairs), deltas.shape[1]).index_add_(0, position, deltas)
        if self.by_frequency:  # as for a batch of this example alone
            gradients /= counts.unsqueeze(1)
        rows = pairs % table
        if self.padding_idx is not None:
            gradients[rows == self.padding_idx] = 0
        return rows, gradients
