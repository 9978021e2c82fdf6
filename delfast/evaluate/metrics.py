"""Accuracy, loss and confidence on the forget, retain and test sets, and the gap to an oracle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from delfast.batches import check_targets, device_of, evaluating, inputs_and_targets
from delfast.errors import InputError
from delfast.evaluate.membership import membership_inference

Loader = Iterable[Any]  # batches (input, target) or (index, input, target)


@dataclass(frozen=True)
class SetResult:
    """One set: accuracy in percent (0-100), mean cross-entropy in nats, (N,) float32 confidence in the true
    class.
    """

    accuracy: float
    loss: float
    confidences: Tensor


@dataclass(frozen=True)
class Metrics:
    """What a network does on the three sets. Accuracies, ``mia`` and deltas are percentages (0-100).

    ``mia``: the part of the forget set that membership inference calls non-member. Deltas, where an oracle
    was given, are oracle - method (DEL paper, section 3: the smaller their size, the better).
    """

    forget_acc: float
    retain_acc: float
    test_acc: float
    forget_loss: float
    retain_loss: float
    test_loss: float
    mia: float
    delta_forget: float | None = None
    delta_mia: float | None = None
    delta_test: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Plain values by name; the deltas only where an oracle was given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    forget: Loader,
    retain: Loader,
    test: Loader,
    *,
    oracle: Metrics | None = None,
    seed: int = 0,
) -> Metrics:
    """Measure ``model`` on its forget, retain and test sets; ``oracle``: the metrics of one retrained without
    the first.

    Loaders yield (input, target) or (index, input, target); target (B,) integers, model(input) (B, classes)
    logits. ``seed`` chooses the examples that membership inference is fitted on. The model is left as it was.
    Raises InputError for an empty set, labels that the model has no output for, and outputs that are not
    finite.
    """
    sets = {"forget": forget, "retain": retain, "test": test}
    results = {name: _measure(model, loader, name) for name, loader in sets.items()}
    metrics = Metrics(
        forget_acc=results["forget"].accuracy,
        retain_acc=results["retain"].accuracy,
        test_acc=results["test"].accuracy,
        forget_loss=results["forget"].loss,
        retain_loss=results["retain"].loss,
        test_loss=results["test"].loss,
        mia=membership_inference(
            results["retain"].confidences, results["test"].confidences, results["forget"].confidences, seed
        ),
    )
    return metrics if oracle is None else Metrics(**{**asdict(metrics), **gaps(metrics, oracle)})


def gaps(metrics: Metrics, oracle: Metrics) -> dict[str, float]:
    """Oracle - method, in percentage points, of forget accuracy, membership inference and test accuracy."""
    return {
        "delta_forget": oracle.forget_acc - metrics.forget_acc,
        "delta_mia": oracle.mia - metrics.mia,
        "delta_test": oracle.test_acc - metrics.test_acc,
    }


def accuracy_and_loss(model: nn.Module, loader: Loader) -> SetResult:
    """Accuracy, mean cross-entropy and true-class confidence over ``loader``, in eval mode without gradients.

    The loss is a mean over examples, accumulated in float64. Modes are restored. Errors as for ``evaluate``.
    """
    return _measure(model, loader, "data")


def _measure(model: nn.Module, loader: Loader, name: str) -> SetResult:
    correct, loss, confidences = 0, 0.0, []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            try:
                targets, log_probabilities = _predict(model, batch)
            except InputError as error:
                raise InputError(f"{name} set: {error}") from None
            true_class = log_probabilities.gather(1, targets[:, None]).squeeze(1)
            correct += int((log_probabilities.argmax(1) == targets).sum())
            loss -= float(true_class.double().sum())
            confidences.append(true_class.exp().cpu())
    count = sum(map(len, confidences))
    if not count:
        raise InputError(f"{name} set: expected at least one example, got none")
    return SetResult(100 * correct / count, loss / count, torch.cat(confidences))


def _predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(B,) labels, (B, classes) float32 log-probabilities; InputError for bad labels and non-finite outputs."""
    inputs, targets = inputs_and_targets(batch, device_of(model))
    logits = model(inputs)
    check_targets(targets, logits)
    if not logits.isfinite().all():
        raise InputError("expected finite outputs of the model, got NaN or infinity; train it with a lower rate")
    return targets, functional.log_softmax(logits.float(), dim=1)
