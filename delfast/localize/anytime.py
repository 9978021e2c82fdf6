"""Localization that stops once more examples no longer change the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from delfast.batches import LossFn, warn_about_loader
from delfast.errors import InputError
from delfast.localize.gradient import add_all
from delfast.localize.scores import WITHOUT_MEAN, Criterion, Scores, gradient_sums
from delfast.mask import Mask
from delfast.naming import trainable_parameters, unwrap


def localize_until_stable(
    model: nn.Module,
    dataset: object,
    criterion: Criterion,
    budget: float,
    settings: Mapping[str, Any],
    bound: float,
    batch_size: int,
    *,
    per_example: bool,
    loss_fn: LossFn | None,
    seed: int,
) -> Mask:
    """The mask at n = batch_size, 2n, 4n, ... examples, until it overlaps the one before by ``bound`` (Jaccard), or
    all examples are taken. No example is computed twice. Errors as ``localize``'s, and InputError for a bound outside
    (0, 1], a batch size below 1, a criterion without a gradient, and anything but a map-style Dataset.
    """
    check_stop(bound, criterion)
    if batch_size < 1:
        raise InputError(f"expected a batch_size of at least 1, got {batch_size}")
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset):
        raise InputError(
            f"expected a map-style Dataset for stop_when_stable, got {type(dataset).__name__}; pass the "
            "data set itself, which is gone through in seeded order"
        )
    network = unwrap(model)
    parameters = trainable_parameters(network)
    if not parameters:
        raise InputError("expected a model with trainable parameters, got none; set requires_grad on those to score")
    available = len(dataset)  # type: ignore[arg-type]  # Dataset declares no __len__; map-style ones have it
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    warn_about_loader(DataLoader(dataset), "forget set")
    sums = gradient_sums(network, parameters, criterion, per_example, loss_fn)
    previous: Mask | None = None
    overlap = None
    taken, goal = 0, batch_size
    while True:
        part = Subset(dataset, order[taken:goal])
        taken += add_all(sums, network, DataLoader(part, batch_size=batch_size), "forget set")
        selection = Scores(parameters, sums.mean(taken), criterion, taken, seed, per_example).choose(budget, **settings)
        mask = selection.mask
        overlap = None if previous is None else previous.jaccard(mask)
        if taken >= available or (overlap is not None and overlap >= bound):
            break
        # a mask of scores that are all 0 is by place alone, and overlaps any other such one in full
        previous, goal = mask if selection.positive else None, 2 * taken
    selection.check()
    facts = {"stop_when_stable": bound, "examples_available": available, "overlap": overlap}
    return Mask(mask.parameters, {**mask.metadata, **facts})


def check_stop(bound: float, criterion: str) -> None:
    """InputError for a bound outside (0, 1], and for a criterion without a gradient."""
    if not 0 < bound <= 1:
        raise InputError(f"expected stop_when_stable in (0, 1], got {bound}; pass the overlap at which to stop")
    if criterion in WITHOUT_MEAN:
        raise InputError(f"expected a criterion with a gradient for stop_when_stable, got '{criterion}'")
