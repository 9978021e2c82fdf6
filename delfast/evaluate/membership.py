"""Membership inference: does the network still treat the forget set as training data?"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from delfast.errors import InputError


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
    for name, confidences in named.items():
        if len(confidences) == 0:
            raise InputError(f"membership inference needs at least one {name} example, got none")
    from sklearn.svm import SVC

    count = min(len(retain_confidences), len(test_confidences))
    generator = torch.Generator().manual_seed(seed)
    members = _subsample(retain_confidences, count, generator)
    non_members = _subsample(test_confidences, count, generator)
    features = torch.cat([members, non_members]).reshape(-1, 1).double().numpy()
    labels = numpy.repeat([1, 0], count)
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(features, labels)
    called = attack.predict(forget_confidences.reshape(-1, 1).double().numpy())
    return float(100 * (called == 0).mean())


def _subsample(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(values) == count:
        return values
    return values[torch.randperm(len(values), generator=generator)[:count]]
