"""One pass over the first batch of every set, before anything changes: what can be refused is refused by then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import check_differentiable, device_of, evaluating, per_example_losses
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import trainable_parameters
from delfast.optim import sparse_gradient
from delfast.unlearning.batchnorm import BatchNormInputs
from delfast.unlearning.head import HeadSearch, uncompiled, uncompiled_function
from delfast.unlearning.loaders import first_batch, preserved, restarts
from delfast.unlearning.methods import Method, UnlearningTask


@dataclass(frozen=True)
class FirstPass:
    """``head``: the classifier head's name, if it was searched for. ``sparse``: parameters with sparse gradients."""

    head: str | None
    sparse: frozenset[str]

    def refuse_sparse(self, network: nn.Module, mask: Mask) -> None:
        """InputError if the mask selects entries of a parameter with sparse gradients: masked optimizers take none."""
        for name, _, _ in mask.match(trainable_parameters(network)):
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
) -> FirstPass:
    """The method's loss of each set's first batch, once, in eval mode and in the precision of the training.

    task: its model is the network inside any wrapper. sets: "retain" and "forget", as far as they are used.

    Two cases are left to the training. A set that is an iterator with a length is not looked at: that would take its
    first batch away. And where a loss_fn is given, an error other than InputError on a set that is trained on: that
    loss_fn may need training mode, as for auxiliary outputs.

    Afterwards everything is as it was, generators included, global ones and those of the loaders. Raises InputError for
    batches, outputs and labels of a form that the loss cannot take, a loss without a gradient, a head that cannot be
    found, and batches that are too small for BatchNorm; and whatever else the model raises.
    """
    network = task.network
    task = replace(task, loss_fn=uncompiled_function(task.loss_fn))
    if find_head and _is_consumed(sets["retain"]):
        raise InputError(
            "expected the head's name, since looking for the head would take a batch from the retain set, an iterator; "
            "pass head='...', or a DataLoader or a list of batches"
        )
    sets = {name: loader for name, loader in sets.items() if not _is_consumed(loader)}
    validation = None if _is_consumed(validation) else validation
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
    ):
        batches = {name: first_batch(loader, name) for name, loader in sets.items()}
        watched = _WatchedTask(**vars(task), maps={id(batches[name]): each for name, each in maps.items()})
        alone = [{name: batch} for name, batch in batches.items()] if method.step_plan != "pairs" else []
        for step in [batches] if pairs else alone:
            searching = search if search is not None and "retain" in step else nullcontext()
            try:
                with torch.autocast(device_of(network).type, torch.bfloat16, enabled=bf16), draws, searching:
                    loss = method.loss(watched, {**step, "epoch": 0, "step": 0})
            except Exception as error:
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
    return FirstPass(None if search is None else search.head(), frozenset(sparse))


def _is_consumed(loader: Any) -> bool:
    """Whether the loader is an iterator with a length. It may restart at its end only."""
    return isinstance(loader, Sized) and not restarts(loader)


@dataclass
class _WatchedTask(UnlearningTask):
    """A task that records, for each batch by its id, what BatchNorm gets of it, and wants a gradient of each."""

    maps: Mapping[int, BatchNormInputs] = field(default_factory=dict)

    def loss(self, batch: Any) -> Tensor:
        with self.maps.get(id(batch), nullcontext()):
            loss = super().loss(batch)
        check_differentiable(loss)
        return loss

    def logits(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        with self.maps.get(id(batch), nullcontext()):
            inputs, logits, targets = super().logits(batch)
        check_differentiable(logits)
        return inputs, logits, targets


def _sparse(loss: Tensor, network: nn.Module) -> Iterator[str]:
    """The names of parameters that an embedding in the loss's graph will give a sparse gradient."""
    names = {id(parameter): name for name, parameter in trainable_parameters(network).items()}
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
