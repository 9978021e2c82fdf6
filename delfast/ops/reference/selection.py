"""Reference of csrc/cpu/selection: the highest scores within a budget; ties fall to the lower index, always."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delfast.ops.layout import pack
from delfast.ops.reference.criticality import element_scores


def select_elements(theta: Sequence[Tensor], grad: Sequence[Tensor], criterion: str, k: int) -> tuple[Tensor, Tensor]:
    """The k highest-scoring scalars over all parameters.

    Returns the packed bits (uint8) of all parameters one after the other, each in row-major order of its elements and
    padded to whole bytes, and ``nonfinite``: an int64 scalar, the first parameter with a NaN or infinite score, or -1.
    With a non-finite score the bits mean nothing.
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
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *bits]), nonfinite


def select_units(
    scores: Tensor, counts: Sequence[int], lengths: Sequence[int], k: int, cut_last: bool
) -> tuple[Tensor, Tensor]:
    """The longest prefix of the units, in falling score, whose sizes sum to at most k.

    scores: float32 or float64 (units,), of all parameters one after the other; their magnitudes count. counts, lengths:
    of each parameter, its number of units and how many scalars each of them holds.
    cut_last: also say how much of the next unit the rest of the budget covers (the published code's cut).
    Returns the packed bits (uint8) of the units chosen whole, each parameter padded to whole bytes, and int64 (3,): the
    cut unit (-1: none), how many of its scalars, and the first unit with a NaN or infinite score (-1: none; else the
    rest means nothing).
    """
    device = scores.device
    sizes = torch.tensor(lengths, dtype=torch.int64, device=device).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64, device=device)
    )
    order = torch.sort(scores.abs(), descending=True, stable=True).indices
    used = sizes[order].cumsum(0)
    # the first unit that does not fit ends the prefix, even if a later, smaller one would fit
    count = int((used <= k).sum())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=device)
    chosen[order[:count]] = True
    spent = int(used[count - 1]) if count else 0
    cut_unit, cut_size = -1, 0
    if cut_last and count < scores.numel() and spent < k:
        cut_unit, cut_size = int(order[count]), k - spent
    nonfinite = int(_first_nonfinite(scores.isfinite(), device))
    bits = [pack(flags) for flags in torch.split(chosen, list(counts))] if len(counts) else []
    return (
        torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *bits]),
        torch.tensor([cut_unit, cut_size, nonfinite], device=device),
    )


def _first_nonfinite(finite: Tensor | list[bool], device: torch.device) -> Tensor:
    """int64 scalar: the first index that is not finite, or -1."""
    bad = (~torch.as_tensor(finite, dtype=torch.bool)).nonzero()
    return torch.tensor(int(bad[0]) if len(bad) else -1, device=device)
