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
    """Percentage of the forget set that an attacker calls non-member. The oracle's figure is the aim, not
    100.

    The attack behind the MIA figures of SalUn (Fan et al., ICLR 2024, arXiv 2310.12508): a support vector
    classifier (RBF kernel, C = 3, gamma "auto") on the softmax confidence of the true class, fitted on equal
    numbers of retain examples (members) and test examples (non-members); the larger set is subsampled by
    ``seed``.

    All confidences: (n,) floating, in [0, 1]. Raises InputError if one of the sets is empty.
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
    """Percentages of the forget set that SalUn's five attackers call non-member, by the feature that each sees.

    Each is the attacker of ``membership_inference`` on another feature of an example's probabilities p, y its label:
    "correctness" (1 where the largest p is p_y, else 0), "confidence" (p_y: ``membership_inference``'s figure),
    "entropy" (nats), "m_entropy" (``modified_entropy``, nats) and "prob" (all of p). All five are fitted on the same
    examples. gamma "auto" is 1 / the number of features: 1, and 1 / classes for "prob".

    Each set: its log-probabilities (n, classes) and integer targets (n,), as ``predictions`` gives them. Raises
    InputError for an empty set, for what are no predictions, and for sets of different numbers of classes.
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
    """(N,) float64 modified entropies in nats: 0 for a sure and right prediction, large for a sure and wrong one.

    -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i), y the label (Song & Mittal, "Systematic Evaluation of
    Privacy Risks of Machine Learning Models", USENIX Security 2021, arXiv 2003.10595: their Mentr). Some published code
    of SalUn's attack sets the columns of every row's label in each row; this is the formula, so "m_entropy" figures
    of such code differ. Finite for any finite log-probabilities. Raises InputError for what are no predictions.
    """
    check_predictions(log_probabilities, targets, "predictions")
    exact = log_probabilities.double()
    # log1p(-p) is imprecise near p = 1 alone, where only the largest of a row can be
    largest = exact.argmax(1)
    log_rest = torch.log1p(-exact.exp()).scatter(1, largest[:, None], log_complement(exact, largest)[:, None])
    others = (exact.exp() * log_rest).scatter(1, targets[:, None].long(), 0.0)
    return -true_class(log_rest, targets).exp() * true_class(exact, targets) - others.sum(1)


def _features(log_probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """(n,) each, but "prob": (n, classes)."""
    probabilities = log_probabilities.exp()
    return {
        "correctness": log_probabilities.argmax(1) == targets.long(),
        "confidence": true_class(log_probabilities, targets).exp(),
        "entropy": -(probabilities.double() * log_probabilities.double()).sum(1),
        "m_entropy": modified_entropy(log_probabilities, targets),
        "prob": probabilities,
    }


def _non_member_percentage(retain: Tensor, test: Tensor, forget: Tensor, seed: int) -> float:
    """The attack on any feature, (n,) or (n, features), of the three sets."""
    classifier = import_svc()
    count = min(len(retain), len(test))
    generator = torch.Generator().manual_seed(seed)
    members = _subsample(retain, count, generator)
    non_members = _subsample(test, count, generator)
    labels = numpy.repeat([1, 0], count)
    attack = classifier(C=3, gamma="auto", kernel="rbf").fit(_rows(torch.cat([members, non_members])), labels)
    return float(100 * (attack.predict(_rows(forget)) == 0).mean())


def import_svc() -> Any:
    """scikit-learn's SVC; ImportError in one line where it is missing."""
    with extra("membership inference", ", or leave it out: evaluate(..., mia=False)"):
        from sklearn.svm import SVC
    return SVC


def _rows(features: Tensor) -> numpy.ndarray:
    """(n, features) float64, as scikit-learn takes them."""
    return features.reshape(len(features), -1).double().cpu().numpy()


def _subsample(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(values) == count:
        return values
    return values[torch.randperm(len(values), generator=generator)[:count]]
