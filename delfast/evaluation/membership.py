"""Membership inference: does the network still treat the forget set as training data?"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from delfast.arguments import check_seed, check_tensors, describe
from delfast.errors import InputError
from delfast.evaluation.outputs import Predictions, check_predictions, log_complement, true_class
from delfast.extras import extra


def membership_inference(
    retain_confidences: Tensor, test_confidences: Tensor, forget_confidences: Tensor, seed: int = 0
) -> float:
    """Return the percentage of the forget set that an attacker calls non-member.

    The aim of unlearning is the oracle's figure, not 100. The attacker is that of SalUn: a support vector classifier
    (RBF kernel, C = 3, gamma "auto") on the softmax confidence of the true class, fitted on equal numbers of retain
    examples (members) and test examples (non-members). The larger set is subsampled. ``evaluate`` passes a language
    model's mean loss of each example, in nats, in place of confidences.

    Parameters
    ----------
    retain_confidences : Tensor
        Confidences (n,) of the retain set, in [0, 1], or losses: floating.
    test_confidences : Tensor
        Confidences of the test set, in the same form.
    forget_confidences : Tensor
        Confidences of the forget set, in the same form.
    seed : int, default 0
        Chooses the subsample of the larger set.

    Returns
    -------
    float
        Percentage (0-100).

    Raises
    ------
    InputError
        For an empty set, and for tensors of another shape or dtype.
    ImportError
        If scikit-learn is missing (``delfast[experiments]``).

    References
    ----------
    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency", ICLR 2024, arXiv 2310.12508.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import membership_inference
    >>> members, others = torch.full((10,), 0.99), torch.full((10,), 0.5)
    >>> membership_inference(members, others, forget_confidences=torch.tensor([0.99, 0.5, 0.5, 0.5]))
    75.0
    """
    named = {"retain": retain_confidences, "test": test_confidences, "forget": forget_confidences}
    seed = check_seed(seed)
    for name, confidences in named.items():
        check_tensors(**{f"{name}_confidences": confidences})
        if confidences.ndim != 1 or not confidences.is_floating_point():
            raise InputError(
                f"expected {name}_confidences (n,) floating, got {confidences.dtype} {tuple(confidences.shape)}; pass "
                "each example's probability of its class"
            )
        if len(confidences) == 0:
            raise InputError(f"membership inference needs at least one {name} example, got none")
    return _non_member_percentage(retain_confidences, test_confidences, forget_confidences, seed)


def svc_attacks(retain: Predictions, test: Predictions, forget: Predictions, seed: int = 0) -> dict[str, float]:
    """Return the percentages of the forget set that SalUn's five attackers call non-member.

    Each is the attacker of ``membership_inference`` on another feature of an example's probabilities p and label y. All
    five are fitted on the same examples. Their gamma "auto" is 1 / the number of features: 1, and 1 / classes for
    "prob".

    Parameters
    ----------
    retain : (Tensor, Tensor)
        Predictions of the retain set, as ``predictions`` returns them: log-probabilities (n, classes) and integer
        targets (n,).
    test : (Tensor, Tensor)
        Predictions of the test set, in the same form.
    forget : (Tensor, Tensor)
        Predictions of the forget set, in the same form.
    seed : int, default 0
        Chooses the subsample of the larger of the retain and test sets.

    Returns
    -------
    dict of str to float
        Percentages (0-100) by feature: "correctness" (1 where the largest p is p_y, else 0), "confidence" (p_y, as in
        ``membership_inference``), "entropy" (nats), "m_entropy" (``modified_entropy``, nats) and "prob" (all of p).

    Raises
    ------
    InputError
        For an empty set, tensors that are no predictions, and sets of different numbers of classes.
    ImportError
        If scikit-learn is missing (``delfast[experiments]``).

    References
    ----------
    Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency", ICLR 2024, arXiv 2310.12508.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import svc_attacks
    >>> targets = torch.zeros(10, dtype=torch.int64)
    >>> members = torch.tensor([[0.99, 0.01]]).log().expand(10, 2), targets
    >>> others = torch.tensor([[0.3, 0.7]]).log().expand(10, 2), targets
    >>> svc_attacks(members, others, forget=others)["confidence"]
    100.0
    """
    named = {"retain": retain, "test": test, "forget": forget}
    seed = check_seed(seed)
    for name, pair in named.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"expected {name} to be (log-probabilities, targets), got {describe(pair)}; pass both")
        check_predictions(*pair, f"{name} set")
    classes = {name: log_probabilities.shape[1] for name, (log_probabilities, _) in named.items()}
    if len(set(classes.values())) > 1:
        raise InputError(f"expected the same classes in all three sets, got {classes}; use one network's predictions")
    members, non_members, attacked = _features(*retain), _features(*test), _features(*forget)
    return {name: _non_member_percentage(members[name], non_members[name], attacked[name], seed) for name in attacked}


def modified_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return modified entropies in nats: 0 for a confident correct prediction, large for a confident wrong one.

    The formula is -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i), with y the label. Some published code of
    SalUn's attack sets the columns of all rows' labels in every row, so its "m_entropy" figures differ. The result is
    finite for any finite log-probabilities.

    Parameters
    ----------
    log_probabilities : Tensor
        Log-probabilities (N, classes) in nats, as ``predictions`` returns them.
    targets : Tensor
        Integer labels (N,).

    Returns
    -------
    Tensor
        Float64 (N,).

    Raises
    ------
    InputError
        For tensors that are no predictions.

    References
    ----------
    Song & Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021, arXiv
    2003.10595, where it is called Mentr.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import modified_entropy
    >>> modified_entropy(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])).round(decimals=3)
    tensor([0.6930], dtype=torch.float64)
    """
    check_predictions(log_probabilities, targets, "predictions")
    exact = log_probabilities.double()
    # log1p(-p) is imprecise only near p = 1, which only the largest p of a row can reach
    largest = exact.argmax(1)
    log_rest = torch.log1p(-exact.exp()).scatter(1, largest[:, None], log_complement(exact, largest)[:, None])
    others = (exact.exp() * log_rest).scatter(1, targets[:, None].long(), 0.0)
    return -true_class(log_rest, targets).exp() * true_class(exact, targets) - others.sum(1)


def _features(log_probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the features by name: (n,) each, except "prob", which is (n, classes)."""
    probabilities = log_probabilities.exp()
    return {
        "correctness": log_probabilities.argmax(1) == targets.long(),
        "confidence": true_class(log_probabilities, targets).exp(),
        "entropy": -(probabilities.double() * log_probabilities.double()).sum(1),
        "m_entropy": modified_entropy(log_probabilities, targets),
        "prob": probabilities,
    }


def _non_member_percentage(retain: Tensor, test: Tensor, forget: Tensor, seed: int) -> float:
    """Attack a feature, (n,) or (n, features), of the three sets; return the percentage called non-member."""
    classifier = import_svc()
    count = min(len(retain), len(test))
    generator = torch.Generator().manual_seed(seed)
    members = _subsample(retain, count, generator)
    non_members = _subsample(test, count, generator)
    labels = numpy.repeat([1, 0], count)
    attack = classifier(C=3, gamma="auto", kernel="rbf").fit(_rows(torch.cat([members, non_members])), labels)
    return float(100 * (attack.predict(_rows(forget)) == 0).mean())


def import_svc() -> Any:
    """Import scikit-learn's SVC; ImportError in one line if it is missing."""
    with extra("membership inference", ", or leave it out: evaluate(..., mia=False)"):
        from sklearn.svm import SVC
    return SVC


def _rows(features: Tensor) -> numpy.ndarray:
    """Return features as scikit-learn expects them: float64 (n, features)."""
    return features.reshape(len(features), -1).double().cpu().numpy()


def _subsample(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(values) == count:
        return values
    return values[torch.randperm(len(values), generator=generator)[:count]]
