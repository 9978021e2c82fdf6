"""The confidence attack: a threshold that separates a forget set from examples that were never seen."""

from __future__ import annotations

import torch
from torch import Tensor

from delfast.arguments import check_seed, check_tensors
from delfast.errors import InputError
from delfast.evaluation.intervals import Figure, difference, proportion

FOLDS = 5  # of the cross-validation; as many as there are members if these are fewer


def threshold_attack(members: Tensor, others: Tensor, weights: Tensor | None = None, *, seed: int = 0) -> Figure:
    """Return the advantage of an attacker who calls an example a member if its confidence is above a threshold.

    The advantage is 2 (balanced accuracy - 1/2), the rate of true positives minus that of false positives: 0 is
    guessing, 1 is perfect. The threshold is chosen on four fifths of both sets, where it has the highest advantage, and
    applied to the rest, by turns (5-fold cross-validation), so that it is not fitted to what it is measured on. A
    negative result, worse than guessing, is reported as 0.

    The attacker is one-sided, as membership inference is: members are the more confident ones. A forget set that the
    network avoids gives no advantage; its accuracy and loss beside those of an oracle show it.

    Parameters
    ----------
    members : Tensor
        Confidences (n,) of the forget set, on any increasing scale, finite; n >= 2.
    others : Tensor
        Confidences (m,) of examples that were never seen, on the same scale; m >= 2.
    weights : Tensor, optional
        Weights (m,) of ``others``, at least 0, some above. Default: equal ones.
    seed : int, default 0
        Chooses the folds.

    Returns
    -------
    Figure
        In [0, 1]. The interval is Newcombe's (1998, method 10) for the difference of two proportions. It treats
        the thresholds as given; with weights the count of ``others`` is Kish's effective sample size. A result below
        guessing has the interval of two equal proportions, the rate of both sets together: the maximum-likelihood
        estimate without a negative advantage.

    Raises
    ------
    InputError
        For fewer than two examples of either, other shapes, and values that are not finite.

    References
    ----------
    Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", IEEE CSF 2018, arXiv
    1709.01604: the advantage, and the attack by the loss. Kish, "Survey Sampling", 1965.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import threshold_attack
    >>> threshold_attack(torch.linspace(2, 3, 50), torch.linspace(0, 1, 50)).value
    1.0
    """
    seed = check_seed(seed)
    check_tensors(members=members, others=others)
    weights = torch.ones_like(others, dtype=torch.float64) if weights is None else weights
    check_tensors(weights=weights)
    for name, values in (("members", members), ("others", others), ("weights", weights)):
        if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
            raise InputError(
                f"expected {name} (n,) of at least two finite values, got {values.dtype} {tuple(values.shape)}; pass "
                "the confidences of more examples"
            )
    if len(weights) != len(others) or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise InputError(f"expected a weight of at least 0, some above, for each of {len(others)} others; pass these")
    return _attack(members.double(), others.double(), weights.double(), seed)


def _attack(members: Tensor, others: Tensor, weights: Tensor, seed: int) -> Figure:
    generator = torch.Generator().manual_seed(seed)
    folds = min(FOLDS, len(members), len(others))
    fold_of = [torch.randperm(len(values), generator=generator) % folds for values in (members, others)]
    caught, alarms = 0.0, 0.0
    for fold in range(folds):
        held = [of == fold for of in fold_of]
        threshold = _threshold(members[~held[0]], others[~held[1]], weights[~held[1]])
        caught += (members[held[0]] > threshold).sum().item()
        alarms += weights[held[1]][others[held[1]] > threshold].sum().item()
    total = weights.sum().item()
    effective = total**2 / weights.square().sum().item()
    count, rates = len(members), (caught / len(members), min(alarms / total, 1.0))
    if rates[0] < rates[1]:
        rates = ((count * rates[0] + effective * rates[1]) / (count + effective),) * 2
    found = difference(proportion(count * rates[0], count), proportion(effective * rates[1], effective))
    return found.mapped(lambda x: min(max(x, 0.0), 1.0))


def _threshold(members: Tensor, others: Tensor, weights: Tensor) -> float:
    """Return the threshold with the highest advantage: midway between two values, or infinity, which calls nobody."""
    if not weights.sum() > 0:
        return torch.inf
    values, order = torch.cat([members, others]).sort()
    rates = torch.cat([torch.full_like(members, 1 / len(members)), -weights / weights.sum()])[order]
    # the advantage of a threshold just below each value: the sum of the rates from there on
    advantages = rates.flip(0).cumsum(0).flip(0)
    below = torch.cat([values.new_full((1,), -torch.inf), values[:-1]])
    advantages = advantages.masked_fill(values == below, -torch.inf)  # a threshold cannot part equal values
    best = int(advantages.argmax())
    if not advantages[best] > 1e-12:  # rounding of the sums
        return torch.inf
    return ((values[best] + below[best]) / 2).item() if best else -torch.inf
