"""What the steps of an epoch are over: batches of the retain set, of the forget set, or of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from delfast.errors import InputError
from delfast.unlearning.loaders import set_epoch

Layout = Literal["retain", "forget", "pairs", "mixed", "forget first"]
"""retain, forget: that set alone. pairs: a batch of each in every step, the forget set over and over. mixed: steps of
either, each batch once, spread evenly. forget first: one set after the other, the forget set in the first epochs only.
"""
_END = object()
Turn = dict[str, Any]  # "retain": a batch, "forget": a batch, "epoch": int, "step": int in the epoch


class Turns:
    """Re-iterable steps, for ``train``: as many in every epoch, as its schedule needs, except with "forget first"."""

    def __init__(
        self, layout: Layout, retain: Iterable[Any], forget: Iterable[Any] | None, forget_epochs: int | None = None
    ) -> None:
        self.layout, self.forget_epochs, self.epoch = layout, forget_epochs, 0
        self.sets: dict[str, Any] = {"forget": forget, "retain": retain}
        if layout in ("retain", "forget"):
            self.sets = {layout: self.sets[layout]}
        for name, loader in self.sets.items():
            try:
                batches = len(loader)
            except TypeError:
                raise InputError(
                    f"expected a {name} set with a length, for the schedule; pass a DataLoader or a list of batches"
                ) from None
            if not batches:
                raise InputError(f"expected a {name} set of at least one batch, got none; check its loader")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, of the loaders too: see ``delfast.unlearning.loaders.set_epoch``."""
        self.epoch = epoch
        for loader in self.sets.values():
            set_epoch(loader, epoch)

    def __len__(self) -> int:
        lengths = {name: len(loader) for name, loader in self.sets.items()}
        return lengths["retain"] if self.layout == "pairs" else sum(lengths.values())

    def __iter__(self) -> Iterator[Turn]:
        for step, turn in enumerate(self._turns()):
            yield {**turn, "epoch": self.epoch, "step": step}

    def _turns(self) -> Iterator[Turn]:
        if self.layout == "pairs":
            forget = _endless(self.sets["forget"], "forget")
            for batch in self.sets["retain"]:
                yield {"retain": batch, "forget": next(forget)}
        elif self.layout == "mixed":
            yield from self._mixed()
        else:
            for name, loader in self.sets.items():
                if name == "forget" and self.forget_epochs is not None and self.epoch >= self.forget_epochs:
                    continue
                for batch in loader:
                    yield {name: batch}

    def _mixed(self) -> Iterator[Turn]:
        """Step i of n takes from the set that is further behind its share, the forget set where both are even."""
        rest = {name: iter(loader) for name, loader in self.sets.items()}
        count = {name: len(loader) for name, loader in self.sets.items()}
        taken = dict.fromkeys(rest, 0)
        for _ in range(sum(count.values())):
            name = min(rest, key=lambda n: (taken[n] + 1) / count[n])
            taken[name] += 1
            batch = next(rest[name], _END)
            if batch is _END:
                raise InputError(
                    f"expected {count[name]} batches of the {name} set, its length, got {taken[name] - 1}; "
                    "correct its __len__"
                )
            yield {name: batch}


def _endless(loader: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches, over and over. InputError if a pass yields none."""
    while True:
        batch_count = 0
        for batch in loader:
            batch_count += 1
            yield batch
        if not batch_count:
            raise InputError(f"expected a {what} set that can be iterated over again, got no batch from another pass")
