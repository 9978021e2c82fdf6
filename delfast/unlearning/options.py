"""Options of the training loop that ``unlearn`` runs, apart from the method and its hyperparameters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from delfast.arguments import check_choice, check_function, check_loader, check_names, check_type
from delfast.errors import InputError
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.unlearning.loop import BatchNormMode, Progress
from delfast.unlearning.method import Method


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity: data sets and functions have no equality
class TrainingOptions:
    """Options of the training loop of ``delfast.unlearn``.

    They have no effect on one-shot methods ("influence" and "ssd"), which run in float32; ``dense``, ``validation`` and
    ``patience`` are refused for them.

    Parameters
    ----------
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward pass under ``torch.autocast``. Parameters, gradients and the optimizer's state keep
        their dtype.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to capture localization and training steps in CUDA graphs; see ``delfast.unlearning.train``. With a
        method of the caller's own, as with a ``loss_fn``, True states that its loss is a pure function of tensors.
    batchnorm : {"train", "frozen"}, default "train"
        "frozen" normalizes by BatchNorm's running statistics and leaves the statistics unchanged, to the bit.
    dense : collection of str, default ()
        Names of parameters to train with a dense gradient, as in ``delfast.compact``. The mask stays the same.
    validation : iterable of batches, optional
        Batches held out of the retain set. Pass ``patience`` too.
    patience : int, optional
        Number of epochs in a row without a lower mean loss on ``validation`` after which training ends. The network
        then has the weights of the epoch with the lowest loss.
    config : mapping of str to plain JSON values, optional
        Values that must be equal when a checkpoint is resumed, in addition to the method, the mask and the options.
    progress : callable, optional
        ``progress(iterable, description, total)``, which returns the same items and displays them as they pass: a
        wrapper of ``tqdm``, for example.

    Examples
    --------
    >>> import delfast
    >>> options = delfast.TrainingOptions(precision="bf16", batchnorm="frozen")
    >>> options.precision, options.batchnorm, options.patience
    ('bf16', 'frozen', None)
    """

    precision: Precision = "fp32"
    channels_last: ChannelsLast = "auto"
    cuda_graphs: CudaGraphs = "auto"
    batchnorm: BatchNormMode = "train"
    dense: Collection[str] = ()
    validation: Iterable[Any] | None = None
    patience: int | None = None
    config: Mapping[str, object] | None = None
    progress: Progress | None = None


DEFAULT_OPTIONS = TrainingOptions()
FORMER_KEYWORDS = ("precision", "batchnorm", "dense", "validation", "patience", "config", "progress")


def check_options(training: TrainingOptions, method: Method) -> None:
    """Raise InputError for options of another type, or without effect on this method."""
    if training.validation is not None:
        check_loader(training.validation, "validation set")
    check_names("dense", training.dense)
    check_type("config", training.config, (Mapping, type(None)), "a mapping or None")
    check_function("progress", training.progress)
    if (training.validation is None) != (training.patience is None):
        raise InputError("expected validation= and patience= together, got one; pass both, or neither")
    if training.dense and not method.epochs:
        raise InputError(
            f"expected no dense= for '{method.name}', which trains nothing, got {training.dense!r}; leave it out"
        )
    if training.patience is not None and not method.epochs:
        raise InputError(
            f"expected no patience for '{method.name}', which has no epochs, got {training.patience}; leave it out"
        )
    Execution(training.precision, training.channels_last, training.cuda_graphs).check()
    check_choice("batchnorm", training.batchnorm, BatchNormMode)


def separate_options(
    training: TrainingOptions, keywords: dict[str, Any], stacklevel: int
) -> tuple[TrainingOptions, dict[str, Any]]:
    """Return the options, and the keywords that are hyperparameters.

    Keywords of ``unlearn`` before version 0.2 that are now fields of ``TrainingOptions`` are accepted under one
    DeprecationWarning. InputError for these beside ``training``. ``stacklevel``: as for ``warnings.warn``, where 2
    names the caller of the function that calls this one.
    """
    check_type("training", training, TrainingOptions, "a delfast.TrainingOptions")
    former = [name for name in FORMER_KEYWORDS if name in keywords]
    if not former:
        return training, keywords
    if training is not DEFAULT_OPTIONS:
        raise InputError(
            f"expected '{former[0]}' in training= alone, got it beside training=; pass TrainingOptions({former[0]}=...)"
        )
    quoted = ", ".join(f"'{name}'" for name in former)
    filled = ", ".join(f"{name}=..." for name in former)
    warnings.warn(
        f"unlearn: {quoted} moved to TrainingOptions, and the keywords of unlearn are removed in the next release; "
        f"pass training=TrainingOptions({filled})",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
    hyperparameters = {name: value for name, value in keywords.items() if name not in former}
    return replace(training, **{name: keywords[name] for name in former}), hyperparameters
