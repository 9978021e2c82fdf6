"""A selection, and whether its scores rank it: units that score 0 are taken by their place in the model alone."""

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
    """A mask, the number of units that it selects (elements for granularity "param"), and of those above 0."""

    mask: Mask
    selected: int
    positive: int

    def check(self, stacklevel: int = 3) -> None:
        """InputError if no unit scores above 0; a warning if some of the selected ones score 0.

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
                f"{self.selected - self.positive} of the {self.selected} {what}s selected score 0, and are taken by "
                "their place in the model alone; lower the budget to leave them out",
                stacklevel=stacklevel,
            )


def positive_count(values: list[Tensor], gradients: list[Tensor], criterion: str) -> Tensor:
    """int64 scalar: the elements that score above 0."""
    counts = [
        element_scores(value, gradients[index] if gradients else None, criterion).count_nonzero()
        for index, value in enumerate(values)
    ]
    return torch.stack(counts).sum()


def positive_left_out(values: list[Tensor], gradients: list[Tensor], criterion: str, bits: Sequence[Tensor]) -> Tensor:
    """bool scalar: True if an element in a sample of the largest parameters scores above 0 and is not selected.

    No selected element scores 0 then, for the highest are selected. It saves a pass over all elements to count those
    above 0, which takes more than half as long as the selection.
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
