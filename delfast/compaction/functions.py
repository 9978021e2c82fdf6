"""Autograd functions whose backward pass computes the gradient of the selected rows of a weight alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from delfast.compaction.gradients import (
    convolution_backward,
    convolution_rows_gradient,
    linear_rows_gradient,
    take_rows,
)
from delfast.compaction.plan import RowPlan


class RowsOfLinear(torch.autograd.Function):
    """x Wᵀ + b for x (N, in), with the gradient of the selected rows of W."""

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
        (output_gradient,) = gradients
        x, rows, weight, gathered, kept = ctx.saved_tensors
        input_gradient = rows_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = output_gradient @ weight
        if ctx.needs_input_grad[1]:
            rows_gradient = linear_rows_gradient(x, output_gradient, gathered, kept).to(rows.dtype)
        if ctx.needs_input_grad[3]:
            bias_gradient = output_gradient.sum(0)
        return input_gradient, rows_gradient, None, bias_gradient, None, None


class RowsOfConvolution(torch.autograd.Function):
    """A convolution of any dimension, transposed or not, with the gradient of the selected rows of its weight."""

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
        (output_gradient,) = gradients
        x, rows, weight, gathered, opposite, kept = ctx.saved_tensors
        input_gradient = rows_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = convolution_backward(
                output_gradient, x, weight, None, *ctx.geometry, ctx.groups, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            plan = RowPlan(gathered, opposite, kept, ctx.small_groups)
            rows_gradient = convolution_rows_gradient(x, output_gradient, weight, plan, ctx.geometry).to(rows.dtype)
        if ctx.needs_input_grad[3]:
            bias_gradient = output_gradient.sum([0, *range(2, output_gradient.dim())])
        return input_gradient, rows_gradient, None, bias_gradient, None, None, None, None, None, None


class RowsOfView(torch.autograd.Function):
    """A view of a weight, with the gradient of its selected rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim = dim
        return weight.view_as(weight)  # autograd refuses in-place changes of a view, as of a Parameter

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (index,) = gradients, ctx.saved_tensors
        return take_rows(gradient, index, ctx.dim), None, None, None
