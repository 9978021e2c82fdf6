"""Parameters that cannot be trained by rows keep their dense gradient; a guard keeps what is not selected as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from delfast.optim import MaskedOptimizer


class Guard:
    """For parameters with the entries (bool, of their shape) that may change. Until ``remove``:

    gradients of the other entries are zero from the moment they arrive, so that clipping does not see them; and after
    every step of any optimizer the other entries get back the values they had, to the bit, whatever weight decay or
    stale momentum did. A ``MaskedOptimizer`` needs no such repair, and gets none.
    """

    def __init__(self, entries: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.entries = {id(p): (p, chosen.to(p.device), p.detach().clone()) for p, chosen in entries}
        self.handles: list[Any] = [
            p.register_hook(_masking(chosen))  # type: ignore[no-untyped-call]
            for p, chosen, _ in self.entries.values()
        ]
        if self.entries:
            self.handles.append(register_optimizer_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Undo the hooks; the parameters stay as they are."""
        for handle in self.handles:
            handle.remove()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if isinstance(optimizer, MaskedOptimizer):
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self.entries:
                    chosen, kept = self.entries[id(parameter)][1:]
                    with torch.no_grad():
                        parameter.copy_(torch.where(chosen, parameter, kept))


def _masking(chosen: Tensor) -> Any:
    def mask(gradient: Tensor) -> Tensor:
        return torch.where(chosen, gradient, 0)  # a product would keep NaN

    return mask
