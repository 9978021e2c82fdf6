"""The training examples of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from delfast.ledger.records import Records


class Examples:
    """Positions in the training set (n,), sorted: those to forget now, those accepted before, and those to retain.

    ``excluded``: open requests that the run does not take up; their examples are not retained either.
    """

    def __init__(
        self, ledger: Records, accepted: Sequence[int], requests: Sequence[int], excluded: Sequence[int]
    ) -> None:
        self.forget = ledger.positions(requests)
        self.erased = ledger.positions(accepted)
        kept = torch.ones(ledger.job.count, dtype=torch.bool)
        for positions in (self.forget, self.erased, ledger.positions(excluded)):
            kept[positions] = False
        self.retain = kept.nonzero().flatten()

    @property
    def requested(self) -> Tensor:
        """Return the examples of all requests that were accepted or are taken up."""
        return torch.cat([self.forget, self.erased]).sort().values
