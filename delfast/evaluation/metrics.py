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
    """Measurements of a network on one set of examples.

    Parameters
    ----------
    accuracy : float
        Percentage (0-100) of examples that are classified as their target.
    loss : float
        Mean cross-entropy in nats.
    confidences : Tensor
        Softmax probability of the true class of each example: float32 (N,), on the CPU.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import SetResult
    >>> SetResult(accuracy=50.0, loss=0.7, confidences=torch.tensor([0.6, 0.4])).accuracy
    50.0
    """

    accuracy: float
    loss: float
    confidences: Tensor


@dataclass(frozen=True)
class Metrics:
    """Measurements of a network on the forget, retain and test sets.

    Accuracies and ``mia`` are percentages (0-100). Deltas are oracle - method in percentage points; the smaller their
    absolute value, the better (DEL paper, section 3). A delta is None without an oracle.

    Parameters
    ----------
    forget_acc : float
        Accuracy on the forget set.
    retain_acc : float
        Accuracy on the retain set.
    test_acc : float
        Accuracy on the test set.
    forget_loss : float
        Mean cross-entropy on the forget set, in nats.
    retain_loss : float
        Mean cross-entropy on the retain set, in nats.
    test_loss : float
        Mean cross-entropy on the test set, in nats.
    mia : float, optional
        Percentage of the forget set that membership inference calls non-member; None if it was not run.
    delta_forget : float, optional
        Oracle's minus method's forget accuracy.
    delta_mia : float, optional
        Oracle's minus method's ``mia``; None if either is None.
    delta_test : float, optional
        Oracle's minus method's test accuracy.

    References
    ----------
    Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization", TMLR 2025,
    arXiv 2412.02432.

    Examples
    --------
    >>> from delfast.evaluation import Metrics
    >>> Metrics(90.0, 99.0, 80.0, 0.3, 0.1, 0.6).as_dict()["test_acc"]
    80.0
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
        """Return the values by name, except those that are None.

        Returns
        -------
        dict of str to float
            Plain values, ready for JSON.
        """
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
    """Measure a network on its forget, retain and test sets, in eval mode without gradients.

    The model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Classifier: ``model(input)`` returns logits (B, classes).
    forget : iterable
        Batches of the forget set: (input, target) or (index, input, target), with integer targets (B,).
    retain : iterable
        Batches of the rest of the training set.
    test : iterable
        Batches of examples that no network was trained on.
    oracle : Metrics, optional
        Metrics of a network that was retrained without the forget set; with them, the deltas are computed.
    seed : int, default 0
        Chooses the examples on which membership inference is fitted.
    mia : bool, default True
        Whether to run membership inference. It needs scikit-learn (``delfast[experiments]``).

    Returns
    -------
    Metrics
        Accuracies, losses, ``mia`` and the deltas.

    Raises
    ------
    InputError
        For arguments of another type, an empty set, labels that the model has no output for, and outputs that are not
        finite.
    ImportError
        If ``mia`` is True and scikit-learn is missing; raised before anything is measured.

    Examples
    --------
    >>> import torch
    >>> import delfast
    >>> model = torch.nn.Linear(2, 2)
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> metrics = delfast.evaluate(model, forget=batches, retain=batches, test=batches, mia=False)
    >>> 0 <= metrics.forget_acc <= 100
    True
    """
    sets = {"forget": forget, "retain": retain, "test": test}
    for name, loader in sets.items():
        check_loader(loader, f"{name} set")
    check_type("oracle", oracle, (Metrics, type(None)), "the Metrics of evaluate(oracle, ...), or None")
    seed = check_seed(seed)
    if check_flag("mia", mia):
        import_svc()  # so that a missing package is reported before the sets are measured
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
    """Return the gaps oracle - method in forget accuracy, test accuracy and membership inference.

    Parameters
    ----------
    metrics : Metrics
        Metrics of the unlearned network.
    oracle : Metrics
        Metrics of a network that was retrained without the forget set.

    Returns
    -------
    dict of str to float
        Percentage points by the names of the deltas in ``Metrics``; without "delta_mia" if either ``mia`` is None.

    Raises
    ------
    InputError
        If an argument is no Metrics.

    Examples
    --------
    >>> from delfast.evaluation import Metrics, gaps
    >>> gaps(Metrics(90.0, 99.0, 80.0, 0.3, 0.1, 0.6), oracle=Metrics(85.0, 99.0, 81.0, 0.5, 0.1, 0.6))
    {'delta_forget': -5.0, 'delta_test': 1.0}
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
    """Measure accuracy, mean cross-entropy and true-class confidences on one set, in eval mode without gradients.

    The model is left as it was.

    Parameters
    ----------
    model : torch.nn.Module
        Classifier: ``model(input)`` returns logits (B, classes).
    loader : iterable
        Batches (input, target) or (index, input, target), with integer targets (B,).

    Returns
    -------
    SetResult
        The loss is a mean over examples, accumulated in float64.

    Raises
    ------
    InputError
        For an empty set, labels that the model has no output for, and outputs that are not finite.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import accuracy_and_loss
    >>> accuracy_and_loss(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]).accuracy
    50.0
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
