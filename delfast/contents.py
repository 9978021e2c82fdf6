"""The contents of data sets and batches as text, to compare them between processes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from numbers import Number
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from delfast.arguments import is_hugging_face
from delfast.batches import data_sets_of, tensors_of

ROWS = 16  # of a datasets.Dataset, which are compared between processes


def signature_of(loader: Any, *, without_varying: bool = False) -> str:
    """Return text that differs between data sets of torch's DataLoaders: types, lengths, and contents in memory.

    For other types the first and the last example are loaded, as the loader does it. without_varying: load
    them again, and leave out examples that then differ, as those that are augmented by a generator of their own.
    """
    parts, known = [], True
    for dataset in data_sets_of(loader):
        size = f" of {len(dataset)}" if isinstance(dataset, Sized) else ""
        parts.append(f"{type(dataset).__qualname__}{size}")
        if is_hugging_face(dataset):
            parts.append(content_of(_rows(dataset)))
        elif isinstance(dataset, (list, tuple)):
            parts.append(content_of([dataset[:1], dataset[-1:]]))
        elif isinstance(dataset, TensorDataset):
            parts += [f"{t.dtype} {tuple(t.shape)} {checksum([t[:1], t[-1:]])}" for t in dataset.tensors]
        elif type(dataset) is Subset:
            parts.append(repr(zlib.crc32(repr([int(i) for i in dataset.indices]).encode())))
        else:
            known = False
    if not known:
        ends = _ends_of(loader)
        varies = without_varying and ends != _ends_of(loader)
        parts.append("examples that vary" if varies else ends)
    return "; ".join(parts)


def _ends_of(loader: Any) -> str:
    """Return the content of the first and the last example, with the same draws of the global generators each time.

    A worker process loads them if workers load for the loader: files that a data set opens belong to one process.
    """
    if not len(loader.dataset):
        return "no example"
    options = {name: getattr(loader, name) for name in ("worker_init_fn", "multiprocessing_context", "timeout")}
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        torch.default_generator.manual_seed(0)  # torch.manual_seed would set the GPUs' generators too
        random.seed(0)
        numpy.random.seed(0)
        ends = DataLoader(
            loader.dataset, batch_size=None, sampler=[0, len(loader.dataset) - 1], collate_fn=_as_it_is,
            num_workers=min(1, loader.num_workers), generator=torch.Generator().manual_seed(0), **options,
        )  # fmt: skip
        return content_of(list(ends))
    except (LookupError, TypeError) as error:  # examples that other indices name
        return type(error).__name__
    finally:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        numpy.random.set_state(generators[2])


def _as_it_is(example: Any) -> Any:
    return example


def _rows(dataset: Any) -> Any:
    """Return rows of a ``datasets.Dataset`` that are evenly spaced, as it stores them: no transform, nothing decoded.

    Its fingerprint is no content: after ``map`` with a function that cannot be pickled it is random.
    """
    rows = sorted({place * (len(dataset) - 1) // (ROWS - 1) for place in range(ROWS)}) if len(dataset) else []
    return dataset.with_format("arrow")[rows].to_pylist()


def content_of(value: Any) -> str:
    """Return a checksum of an example or a batch: of its tensors, and of its other leaves."""
    return f"{checksum(tensors_of(value))} {zlib.crc32(repr(list(_leaves(value))).encode())}"


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves that are no tensors; of an object only the type, since its repr may be its address."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, numpy.ndarray):
        yield from _leaves(value.tolist()) if value.dtype.hasobject else (str(value.dtype), value.tobytes())
    elif value is None or isinstance(value, (str, bytes, Number)):
        yield value
    elif hasattr(value, "__array_interface__"):  # PIL's images
        yield from _leaves(numpy.asarray(value))
    elif not isinstance(value, Tensor):
        yield type(value).__qualname__


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a checksum of the tensors' bytes."""
    total = 0
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total = zlib.crc32(f"{plain.dtype} {tuple(plain.shape)}".encode(), total)
        if plain.layout is torch.strided and not plain.is_quantized:
            total = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data, total)
    return total
