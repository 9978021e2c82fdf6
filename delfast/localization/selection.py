"""A mask together with the number of selected units that score above 0. Units that score 0 have no ranking."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from delfast.errors import InputError
from delfast.mask import Mask
from delfast.ops.layout import packed_bytes, unpack
from delfast.ops.reference.criticality import element_scores

WHY_ZERO = {
    "weight": "every weight is zero",
    "critmem": "the network gets no example right, or needs no channel for any",
}
SAMPLED_PARAMETERS, SAMPLED_ELEMENTS = 8, 1 << 12


@dataclass(frozen=True)
class Selection:
    """A mask, the number of selected units (elements for granularity "param"), and how many of them score above 0."""

    mask: Mask
    selected: int
    positive: int

    def check(self, stacklevel: int = 3) -> None:
        """Raise InputError if no selected unit scores above 0; warn if some selected units score 0.

        stacklevel: as ``warnings.warn``'s. 3 names the caller of the function that calls this method.
        """
        what = "parameter" if self.mask.metadata["granularity"] == "param" else "unit"
        if not self.positive:
            criterion = self.mask.metadata["criterion"]
            raise InputError(
                f"expected a {what} that scores above 0 by '{criterion}', got 0 for all: "
                f"{WHY_ZERO.get(criterion, 'every gradient of the set is zero')}; pass another set or criterion"
            )
        if self.positive < self.selected:
            warnings.warn(
                f"{self.selected - self.positive} of the {self.selected} {what}s selected score 0, and are chosen by "
                "their position in the model alone; lower the budget to leave them out",
                stacklevel=stacklevel,
            )


def positive_count(values: list[Tensor], gradients: list[Tensor], criterion: str) -> Tensor:
    """Count the elements that score above 0: an int64 scalar tensor."""
    counts = [
        element_scores(value, gradients[index] if gradients else None, criterion).count_nonzero()
        for index, value in enumerate(values)
    ]
    return torch.stack(counts).sum()


def positive_left_out(values: list[Tensor], gradients: list[Tensor], criterion: str, bits: Sequence[Tensor]) -> Tensor:
    """Return whether a sample of the largest parameters has an unselected element above 0: a bool scalar tensor.

    If so, no selected element scores 0, because the highest are selected. The sample saves a count over all elements,
    which takes more than half as long as the selection.
    """
    found = [torch.zeros((), dtype=torch.bool, device=values[0].device)]
    for index in sorted(range(len(values)), key=lambda i: -values[i].numel())[:SAMPLED_PARAMETERS]:
        value = values[index] if values[index].ndim else values[index][None]
        if not value.numel():
            continue
        length = value[0].numel()
        rows = -(-SAMPLED_ELEMENTS // length)
        first = max(0, (len(value) - rows) // 2)
        sample = slice(first, first + rows)
        grad = gradients[index].reshape(value.shape)[sample] if gradients else None
        scores = element_scores(value[sample], grad, criterion).flatten()
        start, stop = first * length, first * length + len(scores)
        flags = unpack(bits[index][start // 8 : packed_bytes(stop)], packed_bytes(stop) * 8)[start % 8 :][: len(scores)]
        found.append(((scores > 0) & ~flags).any())
    return torch.stack(found).any()
