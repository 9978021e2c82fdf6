"""A mask together with the number of selected units that score above 0. Units that score 0 have no ranking."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from delfast.errors import InputError
from delfast.mask import Mask

WHY_ZERO = {
    "weight": "every weight is zero",
    "critmem": "the network gets no example right, or needs no channel for any",
}


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
        what = "element" if self.mask.metadata["granularity"] == "param" else "unit"
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
