"""Reference of csrc/cpu/criticality: the score of each channel for the forget set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delfast.ops.layout import row_length, unit_count


def element_scores(theta: Tensor, grad: Tensor | None, criterion: str) -> Tensor:
    """Return c_j of the DEL paper, section 3: ``|theta * grad|``, ``|grad|`` or ``|theta|``; float32, shape of theta.

    16-bit inputs are widened first, so the product is rounded once, to float32. Float64 stays float64.
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    if criterion == "weight":
        return theta.to(wide).abs()
    if grad is None:
        raise ValueError(f"expected a gradient for criterion '{criterion}', got none; pass one per parameter")
    if criterion == "grad":
        return grad.to(wide).abs()
    if criterion == "weighted_grad":
        return (theta.to(wide) * grad.to(wide)).abs()
    raise ValueError(f"expected criterion weighted_grad, grad or weight, got '{criterion}'; add its formula here")


def criticality(
    theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, aggregate: str, top_h: Sequence[int]
) -> Tensor:
    """Score every unit of every parameter.

    A unit is a slice along dim 0 of a parameter with ndim > 1, else one element. A NaN or infinite input gives a NaN or
    infinite score.

    Parameters
    ----------
    theta : sequence of Tensor
        Parameters of any shape; float32, bfloat16, float16 or float64.
    grad : sequence of Tensor
        A gradient of the same shape for each parameter; may be empty for the criterion "weight".
    criterion : {"weighted_grad", "grad", "weight"}
        The score of one element: ``|theta * grad|``, ``|grad|`` or ``|theta|``.
    aggregate : {"topk_mean", "mean", "sum", "max"}
        How the scores of a unit's elements become one; "topk_mean" is the mean of the largest ``top_h``.
    top_h : sequence of int
        For each parameter, the number of elements of "topk_mean", in [1, elements of a unit].

    Returns
    -------
    Tensor
        Scores (units,) of all parameters, concatenated in order; float32, or float64 if a parameter is float64.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432, section 3.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> theta, grad = torch.tensor([[1.0, -2.0], [0.0, 1.0]]), torch.ones(2, 2)
    >>> torch.ops.delfast.criticality([theta], [grad], "weighted_grad", "mean", [1])
    tensor([1.5000, 0.5000])
    """
    parts = []
    for index, parameter in enumerate(theta):
        units, length = unit_count(parameter.shape), row_length(parameter.shape)
        gradient = grad[index] if grad else None
        rows = element_scores(parameter, gradient, criterion).reshape(units, length if units else 0)
        parts.append(_aggregate(rows, aggregate, top_h[index]))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)


def _aggregate(rows: Tensor, aggregate: str, top_h: int) -> Tensor:
    """Reduce scores (units, length) to (units,)."""
    if rows.numel() == 0:
        return rows.new_zeros(rows.shape[0])
    if aggregate == "topk_mean":
        return rows.topk(top_h, dim=1).values.mean(dim=1)
    if aggregate == "mean":
        return rows.mean(dim=1)
    if aggregate == "sum":
        return rows.sum(dim=1)
    return rows.amax(dim=1)
