"""The steps of several processes together: each step of theirs is the mean of as many steps of one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from delfast.batches import sampler_of
from delfast.contents import content_of
from delfast.errors import InputError
from delfast.feeding import feed
from delfast.processes import Processes
from delfast.shares import (
    LOADING,
    WHOLE_SET,
    check_same_set,
    checked_sharding,
    is_torchs,
    refuse_overlap,
)
from delfast.unlearning.loaders import first_batch, preserved
from delfast.unlearning.steps import Step, StepPlan, Steps


class SharedSteps(Steps):
    """The steps of one of W processes: of the steps that one process would make, every W-th.

    Where loaders shard already (DistributedSampler), each process makes the steps of its own loaders. The factor of a
    step's loss is ``step["weight"]``, with which the mean over the processes is the mean over the batches that exist:
    in the last step of an epoch, a process without a batch computes one again with the weight 0.
    """

    def __init__(
        self,
        plan: StepPlan,
        processes: Processes,
        *,
        retain: Iterable[Any],
        forget: Iterable[Any],
        forget_epochs: int | None = None,
    ) -> None:
        super().__init__(plan, retain=retain, forget=forget, forget_epochs=forget_epochs)
        self.processes = processes
        sharded = {name: checked_sharding(loader, processes) is not None for name, loader in self.sets.items()}
        self._is_sharded = all(sharded.values())
        if any(sharded.values()) and not self._is_sharded:
            alone = next(name for name, is_share in sharded.items() if not is_share)
            raise InputError(
                f"expected both sets sharded by their samplers or none, got the {alone} set whole beside a share; "
                f"{WHOLE_SET}"
            )
        self._loaders = {name: _Numbered(loader, processes) for name, loader in self.sets.items()}
        self._checked: list[tuple[int, int] | None] = []  # the orders whose shares have nothing in common

    def check(self, network: nn.Module) -> None:
        """Raise InputError, on every process, unless all have loaders of one set. All processes call it together."""
        for name, loader in self.sets.items():
            settings = f"{self._is_sharded} {len(loader)}"
            error = f"expected the same {name} set on every process, in as many batches, got others; {WHOLE_SET}"
            self.processes.check_same(f"{settings} {is_torchs(loader)}", error)
            with preserved([loader]):
                if is_torchs(loader):
                    check_same_set(loader, self.processes, settings, error)
                elif not self._is_sharded:
                    with self.processes.together():
                        first = content_of(first_batch(loader, name))
                    self.processes.check_same(first, error)
        self._check_shares()
        counts = {super().__len__()} | (set() if self.forget_epochs is None else {len(self.sets["retain"])})
        uneven = [count for count in counts if count % self.processes.size and not self._is_sharded]
        for name, module in network.named_modules():
            if uneven and isinstance(module, nn.SyncBatchNorm):
                raise InputError(
                    f"expected as many batches on every process for the SyncBatchNorm '{name}', got "
                    f"{uneven[0]} steps for {self.processes.size} processes; use BatchNorm, or a multiple"
                )

    def _check_shares(self) -> None:
        """Raise InputError, on every process, if the shares of two have an example in common in this epoch."""
        self._checked = self._orders()
        for name, loader in self.sets.items() if self._is_sharded else ():
            with preserved([loader]):
                refuse_overlap(loader, self.processes, name)

    def feed(self, device: torch.device) -> None:
        """Yield batches in the form that is fastest to use on ``device``; see ``delfast.feeding``."""
        if self._is_sharded:
            super().feed(device)
        for loader in self._loaders.values():
            loader.device = device

    def __len__(self) -> int:
        return super().__len__() if self._is_sharded else -(-super().__len__() // self.processes.size)

    def __iter__(self) -> Iterator[Step]:
        steps = self._own() if self._is_sharded else self._shared()
        for step in steps:
            yield step if self.values is None else {**step, **self.values(step)}

    def _orders(self) -> list[tuple[int, int] | None]:
        """Return what decides each loader's share, the seed and epoch of its DistributedSampler; None if more does."""
        known = {
            name: type(getattr(loader, "batch_sampler", None)) in (BatchSampler, type(None))
            and type(sampler_of(loader)) is DistributedSampler
            for name, loader in self.sets.items()
        }
        samplers = {name: sampler_of(loader) for name, loader in self.sets.items()}
        return [(each.seed, each.epoch) if known[name] else None for name, each in samplers.items()]

    def _own(self) -> Iterator[Step]:
        """Yield the steps of loaders that shard."""
        if self.processes.raise_first(None, more=not all(self._orders()) or self._orders() != self._checked):
            self._check_shares()
        for number, batches in enumerate(self._batches()):
            place = number * self.processes.size + self.processes.rank
            yield {**batches, "epoch": self.epoch, "step": place, "weight": 1.0}

    def _shared(self) -> Iterator[Step]:
        """Yield every W-th of the steps that one process makes in this epoch."""
        for loader in self._loaders.values():
            loader.begin()
        self._fed = dict(self._loaders)
        plan = list(self._batches())  # of numbers: the order that all processes have
        size, rank = self.processes.size, self.processes.rank
        own = list(range(rank, len(plan), size)) or [0]
        read = {
            name: loader.read([plan[number][name] for number in own if name in plan[number]])
            for name, loader in self._loaders.items()
        }
        step: Step = {}
        for start in range(0, len(plan), size):
            counting = min(size, len(plan) - start)
            place = start // size
            if place < len(own):
                batches = {name: _next(read[name], name) for name in plan[own[place]]}
                step = {**batches, "epoch": self.epoch, "step": own[place]}
            yield {**step, "weight": size / counting if rank < counting else 0.0}
        for batches_left in read.values():  # so that the loader's generators have moved alike on every process
            for _ in batches_left:
                pass


class _Numbered:
    """The batches of a loader by number, so that no process loads what it does not use.

    Each pass yields for a DataLoader of examples what its batch sampler yields, by the draws of one process; for
    another iterable the number of the pass and of the batch.
    """

    def __init__(self, loader: Any, processes: Processes) -> None:
        self.loader, self.processes, self.device = loader, processes, torch.device("cpu")
        self._passes = 0

    def begin(self) -> None:
        """Begin an epoch."""
        self._passes = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if not is_torchs(self.loader):
            self._passes += 1
            yield from ((self._passes - 1, place) for place in range(len(self.loader)))
            return
        with self.processes.together():
            units = list(self._draws())
        if not self.processes.is_same(repr(units)):  # of generators that the processes have seeded differently
            units = self.processes.first_of_all(units)
        yield from units

    def _draws(self) -> DataLoader[Any]:
        """Return a DataLoader of indices that makes the draws of the loader."""
        options: dict[str, Any] = {"generator": self.loader.generator, "collate_fn": _as_they_are}
        if self.loader.batch_sampler is None:
            return DataLoader(_Indices(), batch_size=None, sampler=self.loader.sampler, **options)
        return DataLoader(_Indices(), batch_sampler=self.loader.batch_sampler, **options)

    def read(self, units: Sequence[Any]) -> Iterator[Any]:
        """Yield the batches of these numbers, which are in the order of the passes."""
        if not is_torchs(self.loader):
            yield from self._read_passes(list(units))
        elif units:
            options = {name: getattr(self.loader, name) for name in LOADING}
            by: dict[str, Any] = {"batch_size": None, "sampler": units}
            if self.loader.batch_sampler is not None:
                by = {"batch_sampler": units}
            yield from feed(DataLoader(self.loader.dataset, **by, **options), self.device, resident=False)

    def _read_passes(self, units: list[tuple[int, int]]) -> Iterator[Any]:
        """Iterate over every pass of the epoch as a whole, also where this process uses nothing of it."""
        wanted = set(units)
        for number in range(self._passes):
            for place, batch in enumerate(self.loader):
                if (number, place) in wanted:
                    yield batch


def _next(batches: Iterator[Any], what: str) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise InputError(f"expected as many batches of the {what} set as its length, got fewer; correct it") from None


class _Indices(Dataset[Any]):
    """A data set whose examples are their indices."""

    def __getitem__(self, index: Any) -> Any:
        return index

    def __getitems__(self, indices: Any) -> Any:
        return indices


def _as_they_are(indices: Any) -> Any:
    return indices
