"""One pass over the first batch of every set, before anything changes: what can be refused is refused by then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from delfast.batches import check_differentiable, device_of, evaluating, per_example_losses
from delfast.errors import InputError
from delfast.mask import Mask
from delfast.naming import trainable_parameters
from delfast.unlearn.batchnorm import SmallestMaps
from delfast.unlearn.head import HeadSearch, uncompiled
from delfast.unlearn.loaders import first_batch, preserved
from delfast.unlearn.methods import Job, Method


@dataclass(frozen=True)
class FirstPass:
    """``head``: the classifier head's name, if it was searched for. ``sparse``: parameters with sparse gradients."""

    head: str | None
    sparse: frozenset[str]

    def refuse_sparse(self, network: nn.Module, mask: Mask) -> None:
        """InputError if the mask selects of a parameter with sparse gradients, which masked optimizers cannot step."""
        for name, _, part in mask.match(trainable_parameters(network)):
            if name in self.sparse and part.selected:
                raise InputError(
                    f"expected a dense gradient for '{name}', got a sparse one; make its Embedding sparse=False"
                )


def first_pass(
    method: Method,
    job: Job,
    sets: Mapping[str, Iterable[Any]],
    *,
    validation: Iterable[Any] | None,
    bf16: bool,
    frozen_batchnorm: bool,
    find_head: bool,
) -> FirstPass:
    """The method's loss of each set's first batch, once, in eval mode and in the precision of the training.

    job: its model is the network inside any wrapper. sets: "retain" and "forget", as far as they are used.

    Afterwards everything is as it was, generators included, global ones and those of the loaders. Raises InputError for
    batches, outputs and labels of a form that the loss cannot take, a loss without a gradient, a head that cannot be
    found, and batches that are too small for BatchNorm; and whatever the model or the loss_fn raises.
    """
    network = job.network
    loaders = [*sets.values(), *([] if validation is None else [validation])]
    search = HeadSearch(network) if find_head else None
    maps = {name: SmallestMaps(network, frozen_batchnorm) for name in sets if method.epochs}
    sparse: set[str] = set()
    with (
        preserved(loaders) as draws,
        uncompiled(network),
        evaluating(network, gradients=True),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        batches = {name: first_batch(loader, name) for name, loader in sets.items()}
        watched = _WatchedJob(**vars(job), maps={id(batches[name]): each for name, each in maps.items()})
        for turn in [batches] if method.layout == "pairs" else [{name: batch} for name, batch in batches.items()]:
            searching = search if search is not None and "retain" in turn else nullcontext()
            with torch.autocast(device_of(network).type, torch.bfloat16, enabled=bf16), draws, searching:
                loss = method.loss(watched, {**turn, "epoch": 0, "step": 0})
            check_differentiable(loss)
            sparse.update(_sparse(loss, network))
        if validation is not None:
            batch = first_batch(validation, "validation")
            with torch.no_grad(), draws:
                per_example_losses(network, batch, job.loss_fn)
    for name, each in maps.items():
        each.check(sets[name], name)
    return FirstPass(None if search is None else search.head(), frozenset(sparse))


@dataclass
class _WatchedJob(Job):
    """A job that records, for each batch by its id, what BatchNorm gets of it, and wants a gradient of each."""

    maps: Mapping[int, SmallestMaps] = field(default_factory=dict)

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
