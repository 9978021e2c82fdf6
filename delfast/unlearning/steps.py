"""The steps of an epoch: batches of the retain set, of the forget set, or of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from delfast.errors import InputError
from delfast.feeding import feed
from delfast.unlearning.loaders import batch_count, set_epoch

StepPlan = Literal["retain", "forget", "pairs", "mixed", "forget first"]
"""The batches that the steps of an epoch use.

retain, forget: the batches of that set alone. pairs: a batch of each set in every step; the forget set is repeated.
mixed: one batch of either set a step, each batch once, spread evenly. forget first: one batch a step, the forget set
before the retain set, and the forget set in the first epochs only.
"""
Step = dict[str, Any]
"""The batches of a step under "retain" and "forget", the "epoch", the number of the "step" in it, and ``values``."""
_END = object()


class Steps:
    """Re-iterable steps for ``train``. Every epoch has as many, as the schedule needs, except with "forget first"."""

    def __init__(
        self, plan: StepPlan, retain: Iterable[Any], forget: Iterable[Any], forget_epochs: int | None = None
    ) -> None:
        self.plan, self.forget_epochs, self.epoch = plan, forget_epochs, 0
        self.values: Callable[[Step], Step] | None = None  # adds the method's own values to a step
        self.sets: dict[str, Any] = {"forget": forget, "retain": retain}
        if plan in ("retain", "forget"):
            self.sets = {plan: self.sets[plan]}
        for name, loader in self.sets.items():
            batch_count(loader, name)  # raises for a loader without a length or without a batch
        self._fed = dict(self.sets)

    def feed(self, device: torch.device) -> None:
        """Yield batches in the form that is fastest to use on ``device``; see ``delfast.feeding``."""
        self._fed = {name: feed(loader, device) for name, loader in self.sets.items()}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in the loaders too: see ``delfast.unlearning.loaders.set_epoch``."""
        self.epoch = epoch
        for loader in self.sets.values():
            set_epoch(loader, epoch)

    def __len__(self) -> int:
        lengths = {name: len(loader) for name, loader in self.sets.items()}
        return lengths["retain"] if self.plan == "pairs" else sum(lengths.values())

    def __iter__(self) -> Iterator[Step]:
        for number, batches in enumerate(self._batches()):
            step = {**batches, "epoch": self.epoch, "step": number}
            yield step if self.values is None else {**step, **self.values(step)}

    def passes(self, name: str, epochs: int) -> int:
        """Return how often ``epochs`` epochs pass over a set, rounded down."""
        if name == "forget" and self.plan == "pairs":
            return epochs * len(self.sets["retain"]) // len(self.sets["forget"])
        if name == "forget" and self.forget_epochs is not None:
            return min(epochs, self.forget_epochs)
        return epochs

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of each step, by the name of their set."""
        if self.plan == "pairs":
            forget = _endless(self._fed["forget"], "forget")
            for batch in self._fed["retain"]:
                yield {"retain": batch, "forget": next(forget)}
        elif self.plan == "mixed":
            yield from self._mixed()
        else:
            for name, loader in self._fed.items():
                if name == "forget" and self.forget_epochs is not None and self.epoch >= self.forget_epochs:
                    continue
                for batch in loader:
                    yield {name: batch}

    def _mixed(self) -> Iterator[dict[str, Any]]:
        """Yield from the set that is further behind its share of the steps; from the forget set if both are even."""
        rest = {name: iter(loader) for name, loader in self._fed.items()}
        count = {name: len(loader) for name, loader in self.sets.items()}
        used = dict.fromkeys(rest, 0)
        for _ in range(sum(count.values())):
            name = min(rest, key=lambda n: (used[n] + 1) / count[n])
            used[name] += 1
            batch = next(rest[name], _END)
            if batch is _END:
                raise InputError(
                    f"expected {count[name]} batches of the {name} set, its length, got {used[name] - 1}; "
                    "correct its __len__"
                )
            yield {name: batch}


def _endless(loader: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield the batches, pass after pass. InputError if a pass yields none."""
    while True:
        count = 0
        for batch in loader:
            count += 1
            yield batch
        if not count:
            raise InputError(f"expected a {what} set that can be iterated over again, got no batch from another pass")
