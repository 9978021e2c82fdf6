"""What a batch is, and the loss of each of its examples: shared by localization, finetuning and evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.errors import InputError
from delfast.sole_use import sole_use

LossFn = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> per-example losses``, shape (N,)."""


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (the CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def inputs_and_targets(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """Take (input, target) or (index, input, target) apart and move both to ``device``."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise InputError(
            f"expected batches (input, target) or (index, input, target), got {type(batch).__name__}; "
            "pass loss_fn(model, batch) -> per-example losses for batches of another form"
        )
    return move(batch[-2], device), move(batch[-1], device)


def move(value: Any, device: torch.device) -> Any:
    """Tensors, and tuples, lists and dicts of them, on ``device``."""
    return map_tensors(value, lambda t: t.to(device, non_blocking=True))


def detached(batch: Any) -> Any:
    """The batch with tensors that no backward pass goes beyond."""
    return map_tensors(batch, Tensor.detach)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested tuples, lists and dicts; everything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def examples_in(batch: Any, loss_fn: LossFn | None) -> int | None:
    """N if every part of the batch is a tensor of N along dim 0, so that ``cut`` works; else None."""
    parts = _parts(batch[-2:] if loss_fn is None else batch)
    sizes = {part.shape[0] if isinstance(part, Tensor) and part.ndim else None for part in parts}
    return sizes.pop() if len(sizes) == 1 else None


def cut(batch: Any, examples: list[int]) -> Any:
    """These examples of a batch for which ``examples_in`` is not None."""
    return map_tensors(batch, lambda t: t[examples])


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)
    else:
        yield value


def per_example_losses(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """(N,) losses of a batch: cross-entropy of class indices, or the caller's ``loss_fn``."""
    if loss_fn is not None:
        losses = loss_fn(model, move(batch, device_of(model)))
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(f"expected loss_fn to return per-example losses (N,), got {shape}; use reduction='none'")
        return losses
    inputs, targets = inputs_and_targets(batch, device_of(model))
    logits = model(inputs)
    return functional.cross_entropy(logits, check_targets(targets, logits), reduction="none")


def check_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """The targets as int64. InputError unless they are class indices (N,) of these logits (N, classes).

    Any integer type and bool will do: cross-entropy and comparisons of its own take int64 alone.
    """
    for expected, value in (("the model to return logits", logits), ("batches with targets", targets)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"expected {expected} as a tensor, got {type(value).__name__}; pass loss_fn(model, batch) -> "
                "per-example losses"
            )
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise InputError(
            f"expected logits (N, classes) and integer targets (N,), got {tuple(logits.shape)} and "
            f"{targets.dtype} {tuple(targets.shape)}; pass loss_fn for another task"
        )
    targets = targets.to(torch.int64)
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]):
        raise InputError(
            f"expected labels in [0, {logits.shape[1]}), got {int(targets.min())} to {int(targets.max())}; "
            "fix the labels, or build the model with as many outputs as there are classes"
        )
    return targets


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in. InputError if another thread uses it."""
    with sole_use(model):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def warn_about_loader(loader: Any, what: str) -> None:
    """Warn if a loader would not show every example as it is: dropped remainders, random augmentation."""
    if getattr(loader, "drop_last", False):
        warnings.warn(
            f"the {what}'s loader drops its last short batch (drop_last=True): those examples are not seen; "
            "pass a loader that keeps them",
            stacklevel=3,
        )
    dataset = getattr(loader, "dataset", None)
    while dataset is not None:
        for transform in _transforms(getattr(dataset, "transform", None)):
            if type(transform).__name__.startswith(("Random", "AutoAugment", "TrivialAugment", "AugMix")):
                warnings.warn(
                    f"the {what}'s data set augments at random ({type(transform).__name__}): results vary from run "
                    "to run; pass the examples as they are",
                    stacklevel=3,
                )
                return
        dataset = getattr(dataset, "dataset", None)  # Subset


def _transforms(transform: Any) -> list[Any]:
    return list(getattr(transform, "transforms", [transform]))
