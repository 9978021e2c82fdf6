"""Parameters that cannot be trained by rows keep their dense gradient; a guard keeps what is not selected as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from delfast.optim import MaskedOptimizer, check_dense


class Guard:
    """For parameters by name, with the entries (bool, of their shape) that may change. Until ``remove``:

    gradients of the other entries are zero from the moment they arrive, so that clipping does not see them; and a step
    of any optimizer leaves the other entries with the values that they had before it, to the bit, whatever weight decay
    or stale momentum did. An optimizer of ours with this very mask (by its ``digest``) needs no such repair.
    """

    def __init__(self, parameters: Mapping[str, Tensor], chosen: Mapping[str, Tensor], digest: str) -> None:
        self.digest = digest
        self._chosen = {id(parameters[name]): flags for name, flags in chosen.items()}
        self._kept = [parameters[name] for name in chosen]  # or another tensor could get the id of one that is gone
        self._before: list[dict[int, Tensor]] = []  # an optimizer's step may call another's
        self._handles: list[Any] = []
        try:
            for name in chosen:
                hook = self._mask_of(name, parameters[name])
                self._handles.append(parameters[name].register_hook(hook))  # type: ignore[no-untyped-call]
            if chosen:
                self._handles.append(register_optimizer_step_pre_hook(self._before_step))
                self._handles.append(register_optimizer_step_post_hook(self._after_step))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Undo the hooks; the parameters stay as they are."""
        for handle in self._handles:
            handle.remove()

    def _mask_of(self, name: str, parameter: Tensor) -> Any:
        key = id(parameter)

        def mask(gradient: Tensor) -> Tensor:
            check_dense(name, gradient)
            return torch.where(self._flags(key, gradient.device), gradient, 0)  # a product would keep NaN

        return mask

    def _flags(self, key: int, device: torch.device) -> Tensor:
        """The entries that may change, on the device: the model may have moved since."""
        if self._chosen[key].device != device:
            self._chosen[key] = self._chosen[key].to(device)
        return self._chosen[key]

    def _guarded(self, optimizer: Optimizer) -> list[Tensor]:
        if isinstance(optimizer, MaskedOptimizer) and optimizer.mask.digest == self.digest:
            return []
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._chosen]

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._before.append({id(p): p.detach().clone() for p in self._guarded(optimizer)})

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        before = self._before.pop()
        with torch.no_grad():
            for p in self._guarded(optimizer):
                p.copy_(torch.where(self._flags(id(p), p.device), p, before[id(p)]))
