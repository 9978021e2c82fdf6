"""Reference of csrc/cpu/criticality: how much each channel matters to the forget set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delfast.ops.layout import row_length, unit_count


def element_scores(theta: Tensor, grad: Tensor | None, criterion: str) -> Tensor:
    """c_j of the DEL paper, section 3: ``|theta * grad|``, ``|grad|`` or ``|theta|``; float32, shape of theta.

    16-bit inputs are widened first, so the product is rounded once, to float32. float64 stays float64.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    if criterion == "weight":
        return theta.to(wide).abs()
    if grad is None:
        raise ValueError(f"expected a gradient for criterion '{criterion}', got none; pass one per parameter")
    if criterion == "grad":
        return grad.to(wide).abs()
    return (theta.to(wide) * grad.to(wide)).abs()


def criticality(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, aggregate: str, top_h: Sequence[int]
) -> Tensor:
    """Score of every unit of every parameter, concatenated in order: shape (units,), float32, or float64 if a parameter
    is float64.

    theta, grad: one tensor per parameter (grad may be empty for criterion "weight").
    aggregate: "mean", "sum", "max", or "topk_mean", the mean of the ``top_h[p]`` largest of a row.
    A NaN or infinite input gives a NaN or infinite score.
    """
    parts = []
    for index, parameter in enumerate(theta):
        units, length = unit_count(parameter.shape), row_length(parameter.shape)
        gradient = grad[index] if grad else None
        rows = element_scores(parameter, gradient, criterion).reshape(units, length if units else 0)
        parts.append(_aggregate(rows, aggregate, top_h[index]))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)


def _aggregate(rows: Tensor, aggregate: str, top_h: int) -> Tensor:
    """(units, length) -> (units,)."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0])
    if aggregate == "topk_mean":
        return rows.topk(top_h, dim=1).values.mean(dim=1)
    if aggregate == "mean":
        return rows.mean(dim=1)
    if aggregate == "sum":
        return rows.sum(dim=1)
    return rows.amax(dim=1)
