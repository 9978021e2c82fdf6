"""Early stopping: end training when the loss on examples held out no longer falls, with the best epoch's state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from delfast.arguments import check_int
from delfast.batches import LossFn, device_of, per_example_losses
from delfast.device_checks import DeviceChecks
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.feeding import feed
from delfast.joint_calls import averaging, averaging_processes
from delfast.processes import NO_BATCH, Processes
from delfast.sharding import is_laid_out, reshard
from delfast.unlearning.data_parallel import add_up, together
from delfast.unlearning.loaders import preserved

EMPTY = "expected a validation set of at least one example, got none; hold more out"


class EarlyStop:
    """Stop after ``patience`` epochs in a row without a lower validation loss; restore the best epoch's state.

    The state of this object is part of a checkpoint: a resumed run stops where an uninterrupted run stops.

    Under DistributedDataParallel and FSDP2 the loss is the mean over the examples of all processes, which therefore
    stop together. Each may have its own share of the examples held out, of any size, or all of them. Of a network of
    DTensors each process keeps its part of the best epoch's state.

    Parameters
    ----------
    validation : iterable of batches
        The examples held out, re-iterable; of the form that ``train`` uses.
    patience : int
        Number of epochs in a row without a lower mean loss, at least 1.
    loss_fn : callable or None
        ``loss_fn(model, batch)``, which returns losses (N,). None: cross-entropy of class indices.

    Attributes
    ----------
    losses : list of float
        Mean validation loss of each epoch; inf for a loss that is not finite.
    best : dict of str to tensor
        ``state_dict`` of the epoch with the lowest loss.

    Raises
    ------
    InputError
        For an empty validation set, or a patience below 1.

    Examples
    --------
    >>> import torch
    >>> from delfast.unlearning import EarlyStop, train
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 3)
    >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    >>> stop = EarlyStop(batches, patience=2, loss_fn=None)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> result = train(model, batches, optimizer, epochs=3, early_stop=stop)
    >>> len(stop.losses), stop.best_epoch, stop.finished
    (3, 2, False)
    """

    def __init__(self, validation: Iterable[Any], patience: int, loss_fn: LossFn | None) -> None:
        patience = check_int("patience", patience)
        if patience < 1:
            raise InputError(f"expected patience of at least 1 epoch, got {patience}; leave it out for no early stop")
        if not _has_a_batch(validation):
            raise InputError(EMPTY)
        self.validation, self.patience, self.loss_fn = validation, patience, loss_fn
        self.losses: list[float] = []
        self.best: dict[str, Any] = {}

    def reset(self) -> None:
        """Discard the losses and the best state, before another training."""
        self.losses, self.best = [], {}

    @property
    def best_epoch(self) -> int:
        """Number of the first epoch with the lowest loss, from 0."""
        return self.losses.index(min(self.losses))

    @property
    def finished(self) -> bool:
        """Whether the last ``patience`` epochs had no lower loss than an epoch before them."""
        return bool(self.losses) and len(self.losses) - 1 - self.best_epoch >= self.patience

    def __init_subclass__(cls) -> None:
        if "look" in cls.__dict__:  # nothing would call it
            raise TypeError(f"{cls.__name__}: 'look' is now 'update'; rename the method")

    def update(self, model: nn.Module) -> None:
        """Measure the validation loss after an epoch, and keep the state of the best epoch.

        Parameters
        ----------
        model : torch.nn.Module
            The network after the epoch; unchanged.
        """
        self.losses.append(self._loss(model))
        if self.best_epoch == len(self.losses) - 1:
            self.best = copy.deepcopy(model.state_dict())

    def restore(self, model: nn.Module) -> None:
        """Load the best epoch's state into the model, if any epoch was measured.

        Parameters
        ----------
        model : torch.nn.Module
            The network, changed in place.
        """
        if self.best:
            model.load_state_dict(self.best)

    def _loss(self, model: nn.Module) -> float:
        """Return the mean loss over the validation set, in eval mode; inf if the loss is not finite.

        The examples are those of all processes. The network inside of DistributedDataParallel computes the losses:
        the wrapper's forward passes wait for as many on every process.
        """
        wrapper = averaging(model)
        network = model if wrapper is None else wrapper.module
        processes = averaging_processes(model)
        sums, count = [], 0
        with together(processes):
            with evaluating(network), torch.no_grad(), DeviceChecks(device_of(network)) as checks:
                for losses in self._losses_of(network, processes):
                    sums.append(losses.double().sum())
                    count += losses.numel()
                checks.read()
            reshard(network)
            if not count:
                raise InputError(EMPTY)
        total, examples = add_up(processes, math.fsum(torch.stack(sums).tolist()), count)
        return total / examples if math.isfinite(total) else math.inf

    def _losses_of(self, network: nn.Module, processes: Processes | None) -> Iterator[Tensor]:
        """Yield the losses (N,) of each batch.

        Processes that hold the network together compute in step: one that has no batch left computes its first again.
        """
        batches = feed(self.validation, device_of(network))
        if processes is None or not is_laid_out(network):
            yield from (per_example_losses(network, batch, self.loss_fn) for batch in batches)
            return
        spare = NO_BATCH
        for batch in processes.in_step(batches):
            if spare is NO_BATCH:
                spare = batch
            if spare is NO_BATCH:
                raise InputError(EMPTY)
            with processes.in_one_pass(network):
                losses = per_example_losses(network, spare if batch is NO_BATCH else batch, self.loss_fn)
            if batch is not NO_BATCH:
                yield losses

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves.

        Returns
        -------
        dict of str to Any
            ``losses`` and ``best``.
        """
        return {"losses": self.losses, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint.

        Parameters
        ----------
        state : dict of str to Any
            Result of ``state_dict``.
        """
        self.losses, self.best = state["losses"], state["best"]


def _has_a_batch(loader: Any) -> bool:
    """Return whether the loader has a batch: by its length, or else by iterating, with generators restored."""
    try:
        return len(loader) > 0
    except TypeError:
        with preserved([loader]):
            return any(True for _ in loader)
