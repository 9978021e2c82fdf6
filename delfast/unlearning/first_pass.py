"""One pass over the first batch of every set, to refuse bad input before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import check_differentiable, device_of, per_example_losses
from delfast.errors import InputError
from delfast.eval_mode import evaluating
from delfast.mask import Mask
from delfast.masked_optimizer import sparse_gradient
from delfast.naming import trainable_parameters
from delfast.processes import Processes
from delfast.sharding import forget_forward
from delfast.unlearning.batchnorm import BatchNormInputs
from delfast.unlearning.data_parallel import met_in_forward, together
from delfast.unlearning.head import HeadSearch, uncompiled, uncompiled_function
from delfast.unlearning.loaders import first_batch, preserved, restarts
from delfast.unlearning.method import Method, UnlearningTask
from delfast.unlearning.steps import Step


@dataclass(frozen=True)
class FirstPass:
    """Facts about the network, found in the passes over the first batches.

    head: the name of the head, if it was searched for.
    sparse: the names of the parameters with sparse gradients.
    classes: the number of classes, if the method reads logits.
    """

    head: str | None
    sparse: frozenset[str]
    classes: int | None

    def refuse_sparse(self, network: nn.Module, mask: Mask) -> None:
        """Raise InputError if the mask selects a parameter with sparse gradients, which no masked optimizer accepts."""
        for name, _, _ in mask.match(trainable_parameters(network, sharded=True)):
            if name in self.sparse:
                raise sparse_gradient(name)


def check_first_batches(
    method: Method,
    task: UnlearningTask,
    sets: Mapping[str, Iterable[Any]],
    *,
    validation: Iterable[Any] | None,
    bf16: bool,
    frozen_batchnorm: bool,
    find_head: bool,
    processes: Processes | None = None,
) -> FirstPass:
    """Compute the method's loss of each set's first batch, once, in eval mode and in the training's precision.

    task: its model is the network inside any wrapper.
    sets: "retain" and "forget", if they are used.
    processes: those that exchange parameters in each forward pass. All of them make the same passes. If one fails,
        either all raise its error or all ignore it.

    Two cases are left to the training. An iterator with a length is not read, since its first batch would be lost. With
    a ``loss_fn``, an error other than InputError on a set that is trained on is ignored, since the ``loss_fn`` may need
    training mode: for auxiliary outputs, for example.

    The network and all generators, global and of the loaders, are restored. Raises InputError for batches, outputs and
    labels of a form that the loss does not accept, a loss without a gradient, a head that cannot be found, and batches
    that are too small for BatchNorm; passes on other errors of the model.
    """
    network = task.network
    task = replace(task, loss_fn=uncompiled_function(task.loss_fn))
    if find_head and _is_consumed(sets["retain"]):
        raise InputError(
            "expected the head's name, since the search would use up a batch of the retain set, an iterator; "
            "pass head='...', or a DataLoader or a list of batches"
        )
    sets = {name: loader for name, loader in sets.items() if not _is_consumed(loader)}
    validation = None if _is_consumed(validation) else validation
    if processes is not None:
        processes.check_same(
            f"{list(sets)} {validation is not None}",
            "expected loaders of the same types on every process, got iterators on some; pass DataLoaders or lists",
        )
    pairs = method.step_plan == "pairs" and len(sets) == 2
    loaders = [*sets.values(), *([] if validation is None else [validation])]
    search = HeadSearch(network) if find_head else None
    maps = {name: BatchNormInputs(network, frozen_batchnorm) for name in sets if method.epochs}
    sparse: set[str] = set()
    with (
        preserved(loaders, task.loss_fn) as draws,
        uncompiled(network),
        evaluating(network, gradients=True),
        torch.inference_mode(False),
        torch.enable_grad(),
        met_in_forward(network, processes),
    ):
        batches = {name: first_batch(loader, name) for name, loader in sets.items()}
        watched = _WatchedTask(**vars(task), maps={id(batches[name]): each for name, each in maps.items()})
        alone = [{name: batch} for name, batch in batches.items()] if method.step_plan != "pairs" else []
        for step in [batches] if pairs else alone:
            searching = search if search is not None and "retain" in step else nullcontext()
            try:
                with (
                    together(processes),
                    torch.autocast(device_of(network).type, torch.bfloat16, enabled=bf16),
                    draws,
                    searching,
                ):
                    loss = method.loss(watched, _numbered(method, watched, step))
            except Exception as error:
                forget_forward(network)
                if isinstance(error, InputError) or task.loss_fn is None or not method.epochs:
                    raise
                continue
            check_differentiable(loss)
            sparse.update(_sparse(loss, network))
        if validation is not None:
            batch = first_batch(validation, "validation")
            with torch.no_grad(), draws:
                per_example_losses(network, batch, task.loss_fn)
    for name, each in maps.items():
        each.check(sets[name], name)
    return FirstPass(None if search is None else search.head(), frozenset(sparse), watched.classes)


def _numbered(method: Method, task: UnlearningTask, batches: dict[str, Any]) -> Step:
    """Return the first step of the first epoch with these batches."""
    step = {**batches, "epoch": 0, "step": 0}
    return {**step, **method.values(task, step)}


def _is_consumed(loader: Any) -> bool:
    """Return whether the loader is an iterator with a length, which may restart at its end only."""
    return isinstance(loader, Sized) and not restarts(loader)


@dataclass
class _WatchedTask(UnlearningTask):
    """A task that records the inputs of BatchNorm for each batch, by its id, and refuses a loss without a gradient."""

    maps: Mapping[int, BatchNormInputs] = field(default_factory=dict)

    def loss(self, batch: Any) -> Tensor:
        with self.maps.get(id(batch), nullcontext()):
            loss = super().loss(batch)
        check_differentiable(loss)
        return loss

    def logits(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        with self.maps.get(id(batch), nullcontext()):
            inputs, logits, targets = super().logits(batch)
        self.classes = logits.shape[1]
        check_differentiable(logits)
        return inputs, logits, targets


def _sparse(loss: Tensor, network: nn.Module) -> Iterator[str]:
    """Yield the names of parameters that get a sparse gradient from an embedding in the loss's graph."""
    names = {id(parameter): name for name, parameter in trainable_parameters(network, sharded=True).items()}
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        below = [each for each, _ in node.next_functions]
        if getattr(node, "_saved_sparse", False):
            yield from (names[id(each.variable)] for each in below if id(getattr(each, "variable", None)) in names)
        waiting += below
