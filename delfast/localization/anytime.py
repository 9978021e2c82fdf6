"""Anytime localization: stop once more examples no longer change the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from delfast.arguments import check_number, is_scalar
from delfast.batches import LossFn, device_of, sampler_fault, warn_about_loader
from delfast.errors import InputError
from delfast.execution import Execution
from delfast.layer_types import output_dims
from delfast.localization.competing import competing_parameters
from delfast.localization.criteria import WITHOUT_MEAN, Criterion
from delfast.localization.gradient import add_all
from delfast.localization.scores import Scores
from delfast.localization.scoring import gradient_sums
from delfast.localization.selection import Selection
from delfast.mask import Mask
from delfast.naming import trainable_parameters, unwrap
from delfast.shares import LOADING

# the options of a DataLoader that decide how it collates and loads a batch
LOADER_OPTIONS = (*LOADING, "batch_size")


class _Default(int):
    """The default of an argument: ``is`` distinguishes it from the same number passed by a caller."""


BATCH_SIZE = _Default(128)


def localize_until_stable(
    model: nn.Module,
    data: object,
    criterion: Criterion,
    budget: float,
    settings: Mapping[str, Any],
    bound: float,
    batch_size: int,
    *,
    per_example: bool,
    loss_fn: LossFn | None,
    seed: int,
    execution: Execution,
    patterns: Mapping[str, list[str]],
) -> Selection:
    """Select after n = batch_size, 2n, 4n, … examples, until two selections in a row overlap by ``bound`` (Jaccard).

    Otherwise the selection after all examples is returned. No example is computed twice. ``data`` is a map-style data
    set or a DataLoader of one. The arguments were checked by ``check_localize``.
    """
    dataset, options = _map_style(data)
    if loss_fn is None:
        _refuse_batches(dataset)
    if batch_size is not BATCH_SIZE or "batch_size" not in options:
        options["batch_size"] = int(batch_size)
    network = unwrap(model)
    parameters = trainable_parameters(network)
    if not parameters:
        raise InputError("expected a model with trainable parameters, got none; set requires_grad on those to score")
    parameters = competing_parameters(network, parameters, patterns)
    available = len(dataset)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    warn_about_loader(DataLoader(dataset), "forget set")
    everything = DataLoader(Subset(dataset, order), **options)
    sums = gradient_sums(network, parameters, criterion, per_example, loss_fn, execution, everything)
    previous: Mask | None = None
    overlap = None
    done, goal = 0, options["batch_size"]  # positions in the order
    used = 0  # examples in the batches: a collate_fn may leave some out
    worker_seeds = torch.Generator().manual_seed(seed)  # keeps torch's global generator unchanged
    while True:
        loader = DataLoader(Subset(dataset, order[done:goal]), generator=worker_seeds, **options)
        used += add_all(sums, network, loader, "forget set")
        scores = Scores(
            parameters,
            sums.mean(used),
            criterion,
            used,
            seed,
            per_example,
            dims=output_dims(network),
            precision=execution.computed_in(device_of(network)),
            patterns=patterns,
        )
        selection = scores.choose(budget, **settings)
        mask = selection.mask
        overlap = None if previous is None else previous.jaccard(mask)
        if goal >= available or (overlap is not None and overlap >= bound):
            break
        # where all scores are 0, masks depend on position alone and always overlap in full: no sign of stability
        previous, done, goal = mask if selection.positive else None, goal, 2 * goal
    progress = {"stop_when_stable": bound, "examples_available": available, "overlap": overlap}
    return replace(selection, mask=Mask(mask.parameters, {**mask.metadata, **progress}))


def _map_style(data: object) -> tuple[Any, dict[str, Any]]:
    """Return the data set and, if ``data`` is a DataLoader, the options by which it makes batches."""
    dataset, options = data, dict[str, Any]()
    if isinstance(data, DataLoader):
        fault = sampler_fault(data)
        if data.batch_size is None:
            fault = "has no batch_size, because it yields batches of its data set's own"
        if fault is not None:
            raise InputError(
                f"expected a DataLoader of each example once for stop_when_stable, got one that {fault}; pass one of "
                "Subset(dataset, indices) with a batch_size and without a sampler"
            )
        dataset, options = data.dataset, {name: getattr(data, name) for name in LOADER_OPTIONS}
    is_map = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not is_map or isinstance(dataset, (IterableDataset, Mapping, str, bytes, type)) or is_scalar(dataset):
        raise InputError(
            f"expected a map-style Dataset for stop_when_stable, got {type(dataset).__name__}; pass the "
            "data set itself, or a DataLoader of it, whose examples can be read in a seeded order"
        )
    return dataset, options


def _refuse_batches(dataset: Any) -> None:
    """Raise InputError for a list of batches, which ``localize`` accepts without ``stop_when_stable``."""
    first = dataset[0] if isinstance(dataset, (list, tuple)) and dataset else None
    if isinstance(first, (list, tuple)) and first and isinstance(first[-1], Tensor) and first[-1].ndim:
        raise InputError(
            "expected a data set of examples for stop_when_stable, got a list of batches; pass the examples, or a "
            "DataLoader of them"
        )


def check_stop(bound: float, criterion: str) -> None:
    """Raise InputError for a bound outside (0, 1], and for a criterion without a gradient."""
    if not 0 < check_number("stop_when_stable", bound) <= 1:
        raise InputError(f"expected stop_when_stable in (0, 1], got {bound}; pass the overlap at which to stop")
    if criterion in WITHOUT_MEAN:
        raise InputError(f"expected a criterion with a gradient for stop_when_stable, got '{criterion}'; omit one")
