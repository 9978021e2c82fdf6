"""Reference of csrc/cpu/selection: the highest scores within a budget; of equal scores, the lower index is selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delfast.ops.layout import pack
from delfast.ops.reference.criticality import element_scores


def select_elements(theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, k: int) -> tuple[Tensor, Tensor]:
    """Select the k elements with the highest scores over all parameters.

    Parameters
    ----------
    theta : sequence of Tensor
        Parameters of any shape; float32, bfloat16, float16 or float64.
    grad : sequence of Tensor
        A gradient of the same shape for each parameter; may be empty for the criterion "weight".
    criterion : {"weighted_grad", "grad", "weight"}
        The score of one element: ``|theta * grad|``, ``|grad|`` or ``|theta|``.
    k : int
        Number of elements to select; all of them if there are fewer.

    Returns
    -------
    bits : Tensor
        Packed bits (uint8) of all parameters, concatenated; each in row-major order and padded to whole bytes.
    info : Tensor
        Int64 (2,): the first parameter with a NaN or infinite score or -1, and how many of the selected elements score
        above 0. If the first is not -1, the rest of the result is meaningless.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> bits, info = torch.ops.delfast.select_elements([torch.tensor([3.0, 1.0, -2.0])], [], "weight", 2)
    >>> bin(bits.item()), info.tolist()
    ('0b101', [-1, 2])
    """
    scores = [
        element_scores(parameter, grad[index] if grad else None, criterion).reshape(-1)
        for index, parameter in enumerate(theta)
    ]
    device = theta[0].device if theta else torch.device("cpu")
    flat = torch.cat(scores) if scores else torch.empty(0, dtype=torch.float32)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=device)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    bits = [pack(flags) for flags in torch.split(chosen, [score.numel() for score in scores])] if scores else []
    nonfinite = _first_nonfinite([bool(score.isfinite().all()) for score in scores], device)
    positive = flat[chosen].count_nonzero()
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *bits]), torch.stack([nonfinite, positive])


def select_units(
    scores: Tensor, counts: Sequence[int], lengths: Sequence[int], k: int, cut_last: bool
) -> tuple[Tensor, Tensor]:
    """Select the longest prefix of the units, by descending score, whose sizes sum to at most k elements.

    The first unit that does not fit ends the prefix, even if a later, smaller unit would fit.

    Parameters
    ----------
    scores : Tensor
        Scores (units,) of all parameters, concatenated; float32 or float64. Absolute values are compared.
    counts : sequence of int
        Number of units of each parameter.
    lengths : sequence of int
        Number of elements in a unit of each parameter.
    k : int
        Maximum number of elements to select.
    cut_last : bool
        Whether to report how many elements of the next unit the rest of the budget covers, as the published code does.

    Returns
    -------
    bits : Tensor
        Packed bits (uint8) of the units that are selected whole; each parameter is padded to whole bytes.
    info : Tensor
        Int64 (5,): the unit to cut or -1, the number of its elements, the first unit with a NaN or infinite score or
        -1, the number of units selected whole, and how many of these and the cut one score above 0. If the third is
        not -1, the rest of the result is meaningless.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> scores = torch.tensor([0.5, 2.0, 1.0])
    >>> bits, info = torch.ops.delfast.select_units(scores, counts=[3], lengths=[4], k=9, cut_last=True)
    >>> bin(bits.item()), info.tolist()
    ('0b110', [0, 1, -1, 2, 3])
    """
    device = scores.device
    sizes = torch.tensor(lengths, dtype=torch.int64, device=device).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64, device=device)
    )
    order = torch.sort(scores.abs(), descending=True, stable=True).indices
    used = sizes[order].cumsum(0)
    count = int((used <= k).sum())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=device)
    chosen[order[:count]] = True
    spent = int(used[count - 1]) if count else 0
    cut_unit, cut_size = -1, 0
    if cut_last and count < scores.numel() and spent < k:
        cut_unit, cut_size = int(order[count]), k - spent
    positive = int(scores[order[: count + (cut_unit >= 0)]].count_nonzero())
    nonfinite = int(_first_nonfinite(scores.isfinite(), device))
    bits = [pack(flags) for flags in torch.split(chosen, list(counts))] if len(counts) else []
    return (
        torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *bits]),
        torch.tensor([cut_unit, cut_size, nonfinite, count, positive], device=device),
    )


def _first_nonfinite(finite: Tensor | list[bool], device: torch.device) -> Tensor:
    """Return the first index that is not finite, or -1, as an int64 scalar."""
    bad = (~torch.as_tensor(finite, dtype=torch.bool)).nonzero()
    return torch.tensor(int(bad[0]) if len(bad) else -1, device=device)
