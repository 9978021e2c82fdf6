"""Accuracy, loss and confidence on the forget, retain and test sets, and the gap to an oracle."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from delfast.arguments import check_flag, check_loader, check_seed, check_type
from delfast.batches import evaluating
from delfast.evaluation.membership import import_svc, membership_inference
from delfast.evaluation.outputs import Loader, check_examples, predict, true_class


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

    ``mia``: the part of the forget set that membership inference calls non-member; None where it was left out. Deltas,
    where an oracle was given, are oracle - method (DEL paper, section 3: the smaller their size, the better).
    """

    forget_acc: float
    retain_acc: float
    test_acc: float
    forget_loss: float
    retain_loss: float
    test_loss: float
    mia: float | None = None
    delta_forget: float | None = None
    delta_mia: float | None = None
    delta_test: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Plain values by name; without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: nn.Module,
    forget: Loader,
    retain: Loader,
    test: Loader,
    *,
    oracle: Metrics | None = None,
    seed: int = 0,
    mia: bool = True,
) -> Metrics:
    """Measure ``model`` on its forget, retain and test sets; ``oracle``: the metrics of one retrained without
    the first.

    Loaders yield (input, target) or (index, input, target); target (B,) integers, model(input) (B, classes)
    logits. ``seed`` chooses the examples that membership inference is fitted on. The model is left as it was.
    mia: whether to run membership inference. It needs scikit-learn (``delfast[experiments]``): ImportError, before
        anything is measured, where that is missing; accuracies and losses do without.
    Raises InputError for arguments of another type, an empty set, labels that the model has no output for, and outputs
    that are not finite.
    """
    sets = {"forget": forget, "retain": retain, "test": test}
    for name, loader in sets.items():
        check_loader(loader, f"{name} set")
    check_type("oracle", oracle, (Metrics, type(None)), "the Metrics of evaluate(oracle, ...), or None")
    seed = check_seed(seed)
    if check_flag("mia", mia):
        import_svc()  # raises now, not when all sets have been measured
    results = {name: _measure(model, loader, name) for name, loader in sets.items()}
    retained, tested, forgotten = (results[name].confidences for name in ("retain", "test", "forget"))
    metrics = Metrics(
        forget_acc=results["forget"].accuracy,
        retain_acc=results["retain"].accuracy,
        test_acc=results["test"].accuracy,
        forget_loss=results["forget"].loss,
        retain_loss=results["retain"].loss,
        test_loss=results["test"].loss,
        mia=membership_inference(retained, tested, forgotten, seed) if mia else None,
    )
    return metrics if oracle is None else Metrics(**{**asdict(metrics), **gaps(metrics, oracle)})


def gaps(metrics: Metrics, oracle: Metrics) -> dict[str, float]:
    """Oracle - method, in percentage points, of forget accuracy, test accuracy, and membership inference where both
    have it.
    """
    for name, value in (("metrics", metrics), ("oracle", oracle)):
        check_type(name, value, Metrics, "the Metrics that evaluate() returns")
    pairs = {
        "delta_forget": (oracle.forget_acc, metrics.forget_acc),
        "delta_mia": (oracle.mia, metrics.mia),
        "delta_test": (oracle.test_acc, metrics.test_acc),
    }
    return {name: theirs - own for name, (theirs, own) in pairs.items() if theirs is not None and own is not None}


def accuracy_and_loss(model: nn.Module, loader: Loader) -> SetResult:
    """Accuracy, mean cross-entropy and true-class confidence over ``loader``, in eval mode without gradients.

    The loss is a mean over examples, accumulated in float64. Modes are restored. Errors as for ``evaluate``.
    """
    check_loader(loader, "data set")
    return _measure(model, loader, "data")


def _measure(model: nn.Module, loader: Loader, name: str) -> SetResult:
    correct, loss, confidences = 0, 0.0, []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            targets, log_probabilities = predict(model, batch, f"{name} set")
            truth = true_class(log_probabilities, targets)
            correct += int((log_probabilities.argmax(1) == targets).sum())
            loss -= float(truth.double().sum())
            confidences.append(truth.exp().cpu())
    count = sum(map(len, confidences))
    check_examples(count, f"{name} set")
    return SetResult(100 * correct / count, loss / count, torch.cat(confidences))
