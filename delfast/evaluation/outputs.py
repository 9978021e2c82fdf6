"""What a network predicts for each example of a set: the log-probabilities that accuracies and attacks are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.arguments import check_loader, check_tensors
from delfast.batches import check_targets, device_of, evaluating, inputs_and_targets
from delfast.errors import InputError

Loader = Iterable[Any]  # batches (input, target) or (index, input, target)
Predictions = tuple[Tensor, Tensor]  # log-probabilities (N, classes), targets (N,)

# How far a row of probabilities may sum from 1: bfloat16's rounding over some hundred classes, and no more
SUM_TOLERANCE = 1e-2


def predictions(model: nn.Module, loader: Loader) -> Predictions:
    """(N, classes) float32 log-probabilities (nats) and (N,) int64 targets, on the CPU, in the loader's order.

    In eval mode, without gradients; the model is left as it was. Raises InputError for an empty set, labels that the
    model has no output for, and outputs that are not finite.
    """
    check_loader(loader, "data set")
    rows, labels = [], []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            targets, log_probabilities = predict(model, batch, "data set")
            rows.append(log_probabilities.cpu())
            labels.append(targets.to("cpu", torch.int64))
    check_examples(sum(map(len, labels)), "data set")
    return torch.cat(rows), torch.cat(labels)


def predict(model: nn.Module, batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """One batch's (B,) targets and (B, classes) float32 log-probabilities, on the model's device, in the model's mode.

    Raises InputError, which begins with ``where``, for bad labels and outputs that are not finite.
    """
    try:
        inputs, targets = inputs_and_targets(batch, device_of(model))
        logits = model(inputs)
        targets = check_targets(targets, logits)
        if not logits.isfinite().all():
            raise InputError("expected finite outputs of the model, got NaN or infinity; train it with a lower rate")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return targets, functional.log_softmax(logits.float(), dim=1)


def check_examples(count: int, where: str) -> None:
    """InputError unless there is an example."""
    if not count:
        raise InputError(f"{where}: expected at least one example, got none")


def check_predictions(log_probabilities: Tensor, targets: Tensor, where: str) -> None:
    """InputError unless these are predictions as ``predictions`` gives them: of an example or more, in two classes or
    more, finite, each row summing to 1.
    """
    check_tensors(targets=targets)
    check_log_probabilities(log_probabilities, where)
    try:
        check_targets(targets, log_probabilities)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def check_log_probabilities(log_probabilities: Tensor, where: str) -> None:
    """InputError unless (N, classes) finite log-probabilities, N >= 1, classes >= 2, whose exponentials sum to 1."""
    check_tensors(log_probabilities=log_probabilities)
    if log_probabilities.ndim != 2 or log_probabilities.shape[1] < 2 or not log_probabilities.is_floating_point():
        raise InputError(
            f"{where}: expected log-probabilities (N, classes) of two classes or more, got {log_probabilities.dtype} "
            f"{tuple(log_probabilities.shape)}; see delfast.evaluation.predictions"
        )
    check_examples(len(log_probabilities), where)
    if not log_probabilities.isfinite().all():
        raise InputError(f"{where}: expected finite log-probabilities, got NaN or infinity; take log_softmax of logits")
    sums = log_probabilities.double().exp().sum(1)
    worst = sums[(sums - 1).abs().argmax()].item()
    if not abs(worst - 1) <= SUM_TOLERANCE:
        raise InputError(
            f"{where}: expected log-probabilities, whose exponentials sum to 1, got a row that sums to {worst:.4g}; "
            "take log_softmax of logits, log of probabilities"
        )


def true_class(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probabilities of the true classes."""
    return log_probabilities.gather(1, targets[:, None].long()).squeeze(1)


def log_complement(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """(N,) log(1 - p) for each row's class ``classes`` (N,): the log of the sum of the other classes' probabilities.

    That sum keeps its relative precision where p rounds to 1 and 1 - p to 0.
    """
    return log_probabilities.scatter(1, classes[:, None].long(), -torch.inf).logsumexp(1)


def logit_confidences(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N,) float64 logit-scaled confidences log(p / (1 - p)) in the true class, which ``u_lira`` takes.

    LiRA's scaling, under which confidences are about Gaussian (Carlini et al., "Membership Inference Attacks From First
    Principles", IEEE S&P 2022, arXiv 2112.03570), as log p less the log of the other classes' sum: finite and precise
    for any finite logits. Raises InputError for what are no predictions.
    """
    check_predictions(log_probabilities, targets, "predictions")
    exact = log_probabilities.double()
    return true_class(exact, targets) - log_complement(exact, targets)
