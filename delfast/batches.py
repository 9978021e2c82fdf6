"""Batches: their form, the losses of their examples, and checks of loaders.

Localization, unlearning and evaluation share this module.
"""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, SubsetRandomSampler

from delfast.arguments import form_of, is_scalar
from delfast.device_checks import refuse_if
from delfast.errors import InputError
from delfast.execution import DEFAULT_EXECUTION, Execution
from delfast.sharding import whole

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch)`` returns per-example losses (N,)."""

IGNORED = -100  # ``ignore_index`` of cross-entropy: a label whose example has the loss 0
LOSS_FN_ADVICE = "pass loss_fn(model, batch) -> per-example losses"
LABEL_ADVICE = "fix the labels, or build the model with as many outputs as there are classes"

# The form of a batch


class Source(Protocol):
    """Examples that are rows of tensors on one device."""

    def read(self, rows: Tensor) -> Any:
        """Return the batch of these rows, int64 (B,), by operations on tensors alone, as a CUDA graph requires."""


@dataclass(frozen=True, eq=False)
class Indexed(Sequence[Any]):
    """A batch that stores the rows of its examples alone. They are read from their source where they are used.

    ``rows``: int64 (B,), on the device of ``source``. As a sequence it is the batch that ``source`` reads, so that
    ``inputs, targets = batch`` unpacks it; every access reads again.
    """

    rows: Tensor
    source: Source

    def read(self) -> Any:
        """Return the plain batch that the loader yields, on the device of the source."""
        return self.source.read(self.rows)

    def __getitem__(self, part: Any) -> Any:
        return self.read()[part]

    def __len__(self) -> int:
        return len(self.read())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read())


def plain(batch: Any) -> Any:
    """Return an ``Indexed`` batch as its source reads it, and every other batch as it is."""
    return batch.read() if isinstance(batch, Indexed) else batch


def split_batch(batch: Any, advice: str = LOSS_FN_ADVICE) -> tuple[Any, Any, Tensor]:
    """Split a batch that has no ``loss_fn`` into (index, input, target); the index is None for (input, target).

    The first of three parts is an index only if it is N integers, with N the number of targets. Types, dtypes and
    shapes decide, so no tensor is copied from its device. Raises InputError for another form.

    advice: the end of the message, which names arguments of the function that the user has called.
    """
    batch = plain(batch)
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise InputError(
            f"expected batches (input, target) or (index, input, target), got {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, (tuple, list)) else ''}; {advice}"
        )
    *index, inputs, targets = batch
    if is_scalar(targets) or isinstance(targets, Number):
        raise InputError(
            f"expected batches with N targets, got a single example, with the target {form_of(targets)}; pass a "
            "torch.utils.data.DataLoader of the data set"
        )
    if not isinstance(targets, Tensor):
        raise InputError(f"expected batches (input, target) with a tensor of targets, got {form_of(targets)}; {advice}")
    if index and not _is_index(index[0], targets):
        raise InputError(
            "expected batches of three parts to be (index, input, target), the index N integers for N targets, got "
            f"{form_of(index[0])} for targets {tuple(targets.shape)}; drop the first part if it is no input, or else "
            f"{advice}"
        )
    return index[0] if index else None, inputs, targets


def _is_index(index: Any, targets: Tensor) -> bool:
    """Return whether ``index`` is integers, as many as there are targets."""
    if isinstance(index, Tensor):
        integers = index.dtype is not torch.bool and not index.is_floating_point() and not index.is_complex()
        return integers and index.shape == targets.shape[:1]
    if isinstance(index, numpy.ndarray):
        return index.dtype.kind in "iu" and index.shape == tuple(targets.shape[:1])
    integers = isinstance(index, (list, tuple)) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in index
    )
    return integers and (len(index),) == tuple(targets.shape[:1])


def inputs_and_targets(batch: Any, device: torch.device, advice: str) -> tuple[Any, Tensor]:
    """Return input and target of a batch that has no ``loss_fn``, on ``device``; errors as for ``split_batch``."""
    _, inputs, targets = split_batch(batch, advice)
    return move(inputs, device), move(targets, device)


def move(value: Any, device: torch.device) -> Any:
    """Return ``value`` with its tensors on ``device``; see ``map_tensors``. An ``Indexed`` batch is read."""
    return map_tensors(plain(value), lambda t: t.to(device, non_blocking=True))


def detached(batch: Any) -> Any:
    """Return the batch with tensors that have no history, and that autograd can save for a backward pass.

    An ``Indexed`` batch is read.
    """
    return map_tensors(plain(batch), lambda t: t.clone() if t.is_inference() else t.detach())


def map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and mappings; return everything else as it is.

    Tuples, namedtuples, lists, dicts and ``UserDict`` keep their type; transformers' BatchEncoding is a UserDict. Other
    mappings become dicts, because a copy of one may share data with the original. ``value`` itself is not changed. The
    tensor of an ``Indexed`` batch is its rows.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Indexed):
        return Indexed(function(value.rows), value.source)
    if isinstance(value, PackedSequence):  # torch requires its batch sizes on the CPU
        return PackedSequence(function(value.data), value.batch_sizes, *map_tensors([*value[2:]], function))
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, list):
        changed = copy.copy(value)  # a subclass keeps its attributes
        changed[:] = [map_tensors(item, function) for item in value]
        return changed
    if isinstance(value, (dict, UserDict)):
        mapping = copy.copy(value)
        for key, item in value.items():
            mapping[key] = map_tensors(item, function)
        return mapping
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors that ``map_tensors`` finds, in its order."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(value, keep)
    return found


def examples_in(batch: Any, loss_fn: LossFn | None, advice: str = LOSS_FN_ADVICE) -> int | None:
    """Return N if every part of the batch is a tensor of size N along dim 0, as ``cut`` requires; else None.

    Without a ``loss_fn`` every part of a mapping counts too, since evaluation reads those of language models.
    """
    if isinstance(batch, Indexed):
        return len(batch.rows)
    is_whole = loss_fn is not None or isinstance(batch, Mapping)
    parts = _parts(batch if is_whole else split_batch(batch, advice)[1:])
    sizes = {part.shape[0] if isinstance(part, Tensor) and part.ndim else None for part in parts}
    return sizes.pop() if len(sizes) == 1 else None


def cut(batch: Any, examples: list[int], loss_fn: LossFn | None) -> Any:
    """Return these examples of a batch, as (input, target) without a ``loss_fn``.

    ``examples_in`` must have returned a number for the batch. An ``Indexed`` batch stays one.
    """
    if isinstance(batch, Indexed):
        return map_tensors(batch, lambda rows: rows[examples])
    return map_tensors(split_batch(batch)[1:] if loss_fn is None else batch, lambda t: t[examples])


def _parts(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested mappings, tuples and lists."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)
    else:
        yield value


# Losses


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def per_example_losses(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, execution: Execution = DEFAULT_EXECUTION
) -> Tensor:
    """Return a batch's losses (N,): the caller's ``loss_fn``, or cross-entropy with class indices."""
    device = device_of(model)
    with execution.autocast(device):
        if loss_fn is not None:
            return _checked_losses(loss_fn(model, move(batch, device)))
        _, inputs, targets = split_batch(batch)
        logits = whole(model(execution.laid_out(move(inputs, device), model)))
        return functional.cross_entropy(logits, class_indices(targets, logits), reduction="none")


def _checked_losses(losses: Any) -> Tensor:
    """Return the result of a caller's ``loss_fn``. InputError unless it is a tensor (N,)."""
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(f"expected loss_fn to return per-example losses (N,), got {shape}; use reduction='none'")
    return losses


def check_differentiable(losses: Tensor) -> None:
    """Raise InputError for losses that do not depend on a trainable parameter."""
    if not losses.requires_grad:
        raise InputError(
            "expected losses that depend on the model's trainable parameters, got losses without a gradient; compute "
            "them with the model that loss_fn is given, without detach() and no_grad()"
        )


def class_indices(
    targets: Tensor, logits: Tensor, *, ignored: int | None = IGNORED, advice: str = LOSS_FN_ADVICE
) -> Tensor:
    """Return the targets as int64 on the device of the logits, as cross-entropy requires them.

    Any integer type and bool are accepted. Raises InputError unless they are class indices (N,) for these logits
    (N, classes), or ``ignored``. Targets on the CPU are checked at once. Targets on another device are clamped, since
    one out of range would end the process's use of a GPU, and checked by ``refuse_if``. advice: as for ``split_batch``.
    """
    for expected, value in (("the model to return logits", logits), ("batches with targets", targets)):
        if not isinstance(value, Tensor):
            raise InputError(f"expected {expected} as a tensor, got {type(value).__name__}; {advice}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise InputError(
            f"expected logits (N, classes) and integer targets (N,), got {tuple(logits.shape)} and "
            f"{targets.dtype} {tuple(targets.shape)}; {advice}"
        )
    targets, classes = targets.to(torch.int64), logits.shape[1]
    with torch._C.DisableTorchFunction():  # a mode that records the network's operations does not record the check
        if targets.device.type == "cpu":
            _check_range(targets.numpy(), classes, ignored)
            return targets.to(logits.device, non_blocking=True)
        return clamped(targets, classes, ignored)


def clamped(targets: Tensor, classes: int, ignored: int | None) -> Tensor:
    """Return the targets clamped to [0, classes), except ``ignored``. A target that changes is refused later."""
    valid = targets.clamp(0, classes - 1)
    if ignored is not None:
        valid = torch.where(targets == ignored, targets, valid)
    refuse_if((valid != targets).any(), f"expected labels in [0, {classes}), got others; {LABEL_ADVICE}")
    return valid


def _check_range(labels: Any, classes: int, ignored: int | None) -> None:
    """Raise InputError unless every label of a numpy array is in [0, classes) or ``ignored``."""
    if ignored is not None:
        labels = labels[labels != ignored]
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise InputError(f"expected labels in [0, {classes}), got {labels.min()} to {labels.max()}; {LABEL_ADVICE}")


# Loaders


def warn_about_loader(loader: Any, what: str, stacklevel: int = 3) -> None:
    """Warn if a loader does not yield every example once, unchanged.

    It may drop the last batch, repeat or omit examples by its sampler, or augment at random. ``stacklevel``: as
    ``warnings.warn``'s; 3 names the caller of the function that calls this one.
    """
    if getattr(loader, "drop_last", False) or getattr(getattr(loader, "batch_sampler", None), "drop_last", False):
        warnings.warn(
            f"the {what}'s loader drops its last short batch (drop_last=True): those examples are not seen; "
            "pass a loader that keeps them",
            stacklevel=stacklevel,
        )
    fault = sampler_fault(loader)
    if fault is not None and not draws_a_subset(loader):
        warnings.warn(
            f"the {what}'s loader {fault}: the result is not over each example once; pass a loader of "
            "Subset(dataset, indices) without that sampler",
            stacklevel=stacklevel,
        )
    for dataset in data_sets_of(loader):
        for transform in _transforms(getattr(dataset, "transform", None)):
            if type(transform).__name__.startswith(("Random", "AutoAugment", "TrivialAugment", "AugMix")):
                warnings.warn(
                    f"the {what}'s data set augments at random ({type(transform).__name__}): results vary from run "
                    "to run; pass the examples as they are",
                    stacklevel=stacklevel,
                )
                return


def data_sets_of(loader: Any) -> Iterator[Any]:
    """Yield the data set of a loader, then the set that this one is a Subset of, and so on, each once."""
    seen: set[int] = set()
    while isinstance(loader := getattr(loader, "dataset", None), (Dataset, Sized)) and id(loader) not in seen:
        seen.add(id(loader))
        yield loader


def sampler_of(loader: Any) -> Any:
    """Return the sampler of a loader or of its batch sampler; None if there is none."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batches is None else getattr(batches, "sampler", None)


def draws_a_subset(loader: Any) -> bool:
    """Return whether the sampler is a SubsetRandomSampler without repeats, which selects as ``Subset`` does."""
    sampler = sampler_of(loader)
    return isinstance(sampler, SubsetRandomSampler) and len({int(i) for i in sampler.indices}) == len(sampler)


def sampler_fault(loader: Any) -> str | None:
    """Return a text on how a loader's sampler repeats or omits examples; None if no sign of it is found."""
    sampler = sampler_of(loader)
    kind = type(sampler).__name__
    if getattr(sampler, "replacement", False):
        return f"draws with replacement ({kind}), so that examples repeat or are left out"
    try:
        drawn, available = len(sampler), len(loader.dataset)
    except (TypeError, AttributeError, NotImplementedError):  # no sampler, or a stream
        return None
    if drawn != available:
        return f"draws {drawn} of its data set's {available} examples ({kind}), so that examples repeat or are left out"
    return None


def _transforms(transform: Any) -> list[Any]:
    """Return the parts of a composed transform, or the transform alone."""
    return list(getattr(transform, "transforms", [transform]))
