"""Autograd functions whose backward pass computes the gradient of a weight's selected rows alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from delfast.compaction.gradients import convolution_backward, convolution_rows_gradient, linear_rows_gradient
from delfast.compaction.plan import RowPlan


class RowsOfLinear(torch.autograd.Function):
    """x Wᵀ + b, x (N, in), and the gradient of W's selected rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gathered: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, rows, weight, gathered, kept)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (delta,) = gradients
        x, rows, weight, gathered, kept = ctx.saved_tensors
        of_x = of_rows = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = delta @ weight
        if ctx.needs_input_grad[1]:
            of_rows = linear_rows_gradient(x, delta, gathered, kept).to(rows.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = delta.sum(0)
        return of_x, of_rows, None, of_bias, None, None


class RowsOfConvolution(torch.autograd.Function):
    """A convolution of any dimension, transposed or not, and the gradient of its weight's selected rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gathered: Tensor | None,
        opposite: Tensor | None,
        kept: Tensor | None,
        geometry: tuple[Any, ...],
        groups: int,
        small_groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, rows, weight, gathered, opposite, kept)
        ctx.geometry, ctx.groups, ctx.small_groups = geometry, groups, small_groups
        return torch.convolution(x, weight, bias, *geometry, groups)  # type: ignore[call-arg]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (delta,) = gradients
        x, rows, weight, gathered, opposite, kept = ctx.saved_tensors
        of_x = of_rows = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = convolution_backward(delta, x, weight, None, *ctx.geometry, ctx.groups, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            plan = RowPlan(gathered, opposite, kept, ctx.small_groups)
            of_rows = convolution_rows_gradient(x, delta, weight, plan, ctx.geometry).to(rows.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = delta.sum([0, *range(2, delta.dim())])
        return of_x, of_rows, None, of_bias, None, None, None, None, None, None


class RowsOfView(torch.autograd.Function):
    """A weight as it is, and the gradient of its selected rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return weight.view_as(weight)  # of a view autograd refuses changes in place, as it does of a Parameter

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return gradient.index_select(ctx.dim, index), None, None, None
