"""The sizes of a loader's batches, as far as they are known without iterating."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler

from delfast.batches import examples_in
from delfast.execution import CudaGraphs

MIN_BATCHES = 8  # batches of a shape in a job: fewer do not earn the runs that a capture takes


def batch_sizes(loader: Any) -> tuple[int, int] | None:
    """Return the number of examples in the first and in the smallest batch; None if only iterating shows them."""
    if isinstance(loader, (list, tuple)):
        counts = [examples_in(batch, _any_form) for batch in loader]
        known = [count for count in counts if count is not None]
        return (known[0], min(known)) if known and len(known) == len(counts) else None
    if hasattr(loader, "batch_sizes"):
        known_sizes: tuple[int, int] | None = loader.batch_sizes
        return known_sizes
    batch_sampler = getattr(loader, "batch_sampler", None)
    if isinstance(batch_sampler, (list, tuple)):
        sizes = [len(indices) for indices in batch_sampler]
        return (sizes[0], min(sizes)) if sizes else None
    if not isinstance(batch_sampler, BatchSampler) or type(batch_sampler).__iter__ is not BatchSampler.__iter__:
        return None
    try:
        count = len(batch_sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    size, rest = batch_sampler.batch_size, count % batch_sampler.batch_size
    return min(count, size), rest if rest and not batch_sampler.drop_last else size


def _any_form(*_: Any) -> Tensor:
    """Stand for a ``loss_fn``, with which every part of a batch counts."""
    raise NotImplementedError


def is_frequent(loader: Any, epochs: int, cuda_graphs: CudaGraphs) -> Callable[[Any], bool]:
    """Return the function of a batch that decides whether its shape is captured in a job of ``epochs`` passes.

    loader: the loader of the whole set; None: no shape.
    """
    if loader is None:
        return lambda batch: False
    if cuda_graphs is True:
        return lambda batch: True
    count = functools.cache(functools.partial(batches_of_size, loader))
    return lambda batch: epochs * count(examples_in(batch, _any_form)) >= MIN_BATCHES


def batches_of_size(loader: Any, examples: int | None) -> int:
    """Return how many batches of a pass over the loader have this number of examples.

    If that number or the sizes of the loader's batches are not known, all batches count; if the loader has no length,
    none.
    """
    try:
        count = len(loader)
    except (TypeError, NotImplementedError):
        return 0
    sizes = batch_sizes(loader)
    if sizes is None or examples is None:
        return count
    if isinstance(loader, (list, tuple)):
        return sum(examples_in(batch, _any_form) == examples for batch in loader)
    first, smallest = sizes
    shorter = int(smallest != first)
    return count - shorter if examples == first else shorter
