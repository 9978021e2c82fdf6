"""Early stopping: when the loss on examples held out no longer falls, back to where it was lowest."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from delfast.arguments import check_int
from delfast.batches import LossFn, evaluating, per_example_losses
from delfast.errors import InputError
from delfast.unlearning.loaders import preserved

EMPTY = "expected a validation set of at least one example, got none; hold more out"


def _yields_a_batch(loader: Any) -> bool:
    """Return whether the loader has a batch: by its length, or else by iterating, with generators restored."""
    try:
        return len(loader) > 0
    except TypeError:
        with preserved([loader]):
            return any(True for _ in loader)


class EarlyStop:
    """Stops after ``patience`` epochs in a row without a lower mean loss on ``validation``, and keeps the best epoch's
    state. Its own state is part of a checkpoint, so a resumed run stops where an uninterrupted one would.
    """

    def __init__(self, validation: Iterable[Any], patience: int, loss_fn: LossFn | None) -> None:
        patience = check_int("patience", patience)
        if patience < 1:
            raise InputError(f"expected patience of at least 1 epoch, got {patience}; leave it out for no early stop")
        if not _yields_a_batch(validation):
            raise InputError(EMPTY)
        self.validation, self.patience, self.loss_fn = validation, patience, loss_fn
        self.losses: list[float] = []
        self.best: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget what was seen, for another training."""
        self.losses, self.best = [], {}

    @property
    def best_epoch(self) -> int:
        """Of those with the lowest loss the first, from 0."""
        return self.losses.index(min(self.losses))

    @property
    def finished(self) -> bool:
        return bool(self.losses) and len(self.losses) - 1 - self.best_epoch >= self.patience

    def update(self, model: nn.Module) -> None:
        """Measure the model after an epoch, and keep its state if it is the best so far."""
        self.losses.append(self._loss(model))
        if self.best_epoch == len(self.losses) - 1:
            self.best = copy.deepcopy(model.state_dict())

    def restore(self, model: nn.Module) -> None:
        """The best epoch's state, if any was measured."""
        if self.best:
            model.load_state_dict(self.best)

    def _loss(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        with evaluating(model), torch.no_grad():
            for batch in self.validation:
                losses = per_example_losses(model, batch, self.loss_fn)
                total, count = total + float(losses.double().sum()), count + losses.numel()
        if not count:
            raise InputError(EMPTY)
        return total / count if math.isfinite(total) else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.best = state["losses"], state["best"]
