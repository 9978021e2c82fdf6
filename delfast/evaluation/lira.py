"""LiRA: attacks that distinguish, by example, a network from one that never saw the example.

U-LiRA has shadows of both kinds: networks that unlearned the examples, and networks that never saw them. The offline
LiRA has the second kind alone, which can be trained before there is a request to forget.

Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", 2024, arXiv
2403.01218, after the online LiRA of Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P
2022, arXiv 2112.03570 (Algorithm 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from delfast.arguments import check_flag, check_number, check_tensors, describe
from delfast.errors import InputError

# Minimum variance of logit-scaled confidences. The deviation of 0.001 is well above float32's rounding of logits, and
# keeps likelihoods finite when all networks agree.
VARIANCE_FLOOR = 1e-6
MIN_SHADOWS = 2  # of each kind, since a variance needs two values


@dataclass(frozen=True)
class ULira:
    """Result of the attack.

    Scores are float64 log-likelihood ratios in nats, in the shape of the attacked confidences. Above 0, "trained on the
    example and then unlearned it" is more likely than "trained without it".

    Parameters
    ----------
    accuracy : float
        Percentage (0-100) of correct decisions, the mean over the two kinds: 50 for perfect unlearning, 100 if every
        decision is correct. A score of 0 counts as half correct.
    tpr : float
        Percentage (0-100) of the unlearned scores above the lowest threshold that at most ``fpr`` percent of the
        retrained scores exceed.
    fpr : float
        That false positive rate, in percent.
    unlearned_scores : Tensor
        Scores of the attacked unlearned networks.
    retrained_scores : Tensor
        Scores of the attacked oracles.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import ULira
    >>> ULira(50.0, 1.0, 1.0, torch.zeros(3), torch.zeros(3)).accuracy
    50.0
    """

    accuracy: float
    tpr: float
    fpr: float
    unlearned_scores: Tensor
    retrained_scores: Tensor


def u_lira(
    unlearned: Tensor,
    retrained: Tensor,
    attacked_unlearned: Tensor,
    attacked_retrained: Tensor,
    *,
    fixed_variance: bool = False,
    fpr: float = 1.0,
) -> ULira:
    """Attack networks of both kinds with Gaussians that are fitted, for every example, to shadow networks of each kind.

    The score of an example with confidence x is log N(x; mean and variance of its unlearned shadows) - log N(x; mean
    and variance of its retrained shadows). Variances are unbiased (n - 1) and at least ``VARIANCE_FLOOR``.

    Parameters
    ----------
    unlearned : Tensor
        Logit-scaled confidences (models, examples) of networks that were trained on the examples and then unlearned
        them, as ``logit_confidences`` returns them. If only
        probabilities p are known, pass ``torch.logit(p)``, which is infinite where p has rounded to 0 or 1.
    retrained : Tensor
        Confidences of oracles: networks that were trained without the examples. In the same form.
    attacked_unlearned : Tensor
        Confidences (examples,) or (models, examples) of unlearned networks that are not among the shadows.
    attacked_retrained : Tensor
        Confidences of oracles that are not among the shadows, in the same form.
    fixed_variance : bool, default False
        Whether to use one variance for all examples, the mean of theirs, for each kind. It is LiRA's remedy for too few
        shadows to estimate each example's variance.
    fpr : float, default 1.0
        False positive rate of ``tpr``, in percent, in [0, 100).

    Returns
    -------
    ULira
        Accuracy, true positive rate and scores.

    Raises
    ------
    InputError
        For fewer than two shadows of a kind, no example, tensors of different examples, and values that are not finite.

    See Also
    --------
    u_lira_leave_one_out : Attack each shadow network with all others.

    References
    ----------
    Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", 2024, arXiv
    2403.01218.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import u_lira
    >>> unlearned, retrained = torch.tensor([[4.0], [5.0]]), torch.tensor([[-5.0], [-4.0]])
    >>> u_lira(unlearned, retrained, torch.tensor([4.5]), torch.tensor([-4.5])).accuracy
    100.0
    """
    shadows = {"unlearned": unlearned, "retrained": retrained}
    attacked = {"attacked_unlearned": attacked_unlearned, "attacked_retrained": attacked_retrained}
    check_flag("fixed_variance", fixed_variance)
    _check_fpr(fpr)
    _check_shadows(shadows, MIN_SHADOWS)
    for name, values in attacked.items():
        _check_values(name, values, examples=unlearned.shape[1])
    gaussians = [_gaussian(values.double(), fixed_variance) for values in shadows.values()]
    positives, negatives = (
        _log_likelihood(values.double(), *gaussians[0]) - _log_likelihood(values.double(), *gaussians[1])
        for values in attacked.values()
    )
    right = (_share_above_zero(positives) + _share_above_zero(-negatives)) / 2
    return ULira(100 * right, tpr_at_fpr(positives, negatives, fpr), fpr, positives, negatives)


def u_lira_leave_one_out(
    unlearned: Tensor, retrained: Tensor, *, fixed_variance: bool = False, fpr: float = 1.0
) -> ULira:
    """Run ``u_lira`` on every pair of an unlearned network and an oracle, with all other networks as shadows.

    Use it if networks are too costly to keep some apart from the shadows. Pair i is the i-th network of each kind. One
    of each kind is left out, because otherwise the other kind's Gaussian would have one shadow more and fit better, and
    perfect unlearning would come out below 50. If one kind has more networks, its last ones are always shadows.

    Parameters
    ----------
    unlearned : Tensor
        Logit-scaled confidences (models, examples) of networks that were trained on the examples and then unlearned
        them, as ``logit_confidences`` returns them.
    retrained : Tensor
        Confidences of oracles: networks that were trained without the examples. In the same form.
    fixed_variance : bool, default False
        Whether to use one variance for all examples, the mean of theirs, for each kind. It is LiRA's remedy for too few
        shadows to estimate each example's variance.
    fpr : float, default 1.0
        False positive rate of ``tpr``, in percent, in [0, 100).

    Returns
    -------
    ULira
        The mean accuracy of the pairs; scores are (pairs, examples).

    Raises
    ------
    InputError
        For fewer than three networks of a kind, no example, tensors of different examples, and values that are not
        finite.

    See Also
    --------
    u_lira : Attack networks that are not among the shadows.

    References
    ----------
    Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", 2024, arXiv
    2403.01218.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import u_lira_leave_one_out
    >>> unlearned = torch.tensor([[4.0], [5.0], [6.0]])
    >>> u_lira_leave_one_out(unlearned, -unlearned).accuracy
    100.0
    """
    check_flag("fixed_variance", fixed_variance)
    _check_fpr(fpr)
    _check_shadows({"unlearned": unlearned, "retrained": retrained}, MIN_SHADOWS + 1)
    pairs = [
        u_lira(
            _without(unlearned, i),
            _without(retrained, i),
            unlearned[i],
            retrained[i],
            fixed_variance=fixed_variance,
            fpr=fpr,
        )
        for i in range(min(len(unlearned), len(retrained)))
    ]
    positives = torch.stack([pair.unlearned_scores for pair in pairs])
    negatives = torch.stack([pair.retrained_scores for pair in pairs])
    accuracy = math.fsum(pair.accuracy for pair in pairs) / len(pairs)
    return ULira(accuracy, tpr_at_fpr(positives, negatives, fpr), fpr, positives, negatives)


def offline_lira(
    attacked: Tensor, references: Tensor, members: Tensor | None = None, *, fixed_variance: bool = True
) -> Tensor:
    """Return by example how far its confidence is above that of networks which never saw it: the offline LiRA.

    The score of an example with confidence x is (x - mean) / (s sqrt(1 + 1/n)), of the n reference models that never
    saw it, with s their deviation. Carlini et al. report the standard normal's distribution function of (x - mean) / s,
    which ranks the examples alike where n is one number. The factor is the mean's own error: with it examples that have
    different numbers of reference models are comparable.

    Parameters
    ----------
    attacked : Tensor
        Logit-scaled confidences (examples,) of the attacked network, as ``logit_confidences`` returns them.
    references : Tensor
        Confidences (models, examples) of the reference models.
    members : Tensor, optional
        Bool (models, examples): whether a reference model was trained on an example. The score leaves it out then.
        Default: none was.
    fixed_variance : bool, default True
        Whether to use one variance for all examples: the paper's advice below 64 reference models. Otherwise each
        example's. Either is unbiased, and at least ``VARIANCE_FLOOR``.

    Returns
    -------
    Tensor
        Scores, float64 (examples,), NaN for an example with fewer than two reference models. Large: a member.

    Raises
    ------
    InputError
        For no reference model, tensors of different examples, and values that are not finite.

    References
    ----------
    Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, arXiv 2112.03570, section VI.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import offline_lira
    >>> offline_lira(torch.tensor([4.0, 1.0]), torch.tensor([[0.0, 0.0], [2.0, 2.0]])).round(decimals=2)
    tensor([1.7300, 0.0000], dtype=torch.float64)
    """
    check_flag("fixed_variance", fixed_variance)
    _check_shadows({"references": references}, 1)
    _check_values("attacked", attacked, references.shape[1])
    if attacked.ndim != 1:
        raise InputError(
            f"attacked: expected (examples,) of one network, got {tuple(attacked.shape)}; attack each alone"
        )
    check_tensors(**({} if members is None else {"members": members}))
    if members is not None and (members.dtype is not torch.bool or members.shape != references.shape):
        raise InputError(
            f"expected members to be bool {tuple(references.shape)}, got {members.dtype} {tuple(members.shape)}; pass "
            "whether each reference model was trained on each example"
        )
    out = torch.ones_like(references, dtype=torch.bool) if members is None else ~members
    values, counts = references.double(), out.sum(0)
    means = torch.where(out, values, 0.0).sum(0) / counts
    squares = torch.where(out, values - means, 0.0).square().sum(0)
    usable = counts >= MIN_SHADOWS
    free = counts - 1  # degrees of freedom
    variance = squares[usable].sum() / free[usable].sum() if fixed_variance else squares / free
    spread = variance.clamp(min=VARIANCE_FLOOR) * (1 + 1 / counts)
    return torch.where(usable, (attacked.double() - means) / spread.sqrt(), torch.nan)


def tpr_at_fpr(positives: Tensor, negatives: Tensor, fpr: float) -> float:
    """Return the percentage of positives above the lowest threshold that at most ``fpr`` percent of negatives exceed.

    With fewer than 100 / fpr negatives, none may exceed the threshold.

    Parameters
    ----------
    positives : Tensor
        Scores of any shape.
    negatives : Tensor
        Scores of any shape.
    fpr : float
        False positive rate in percent, in [0, 100).

    Returns
    -------
    float
        True positive rate in percent (0-100).

    Raises
    ------
    InputError
        For an empty or non-finite set of scores, and an ``fpr`` outside its range.

    Examples
    --------
    >>> import torch
    >>> from delfast.evaluation import tpr_at_fpr
    >>> tpr_at_fpr(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.5, 1.5, 2.5]), fpr=25.0)
    75.0
    """
    _check_fpr(fpr)
    check_tensors(positives=positives, negatives=negatives)
    for name, scores in {"positives": positives, "negatives": negatives}.items():
        if not scores.numel() or not scores.isfinite().all():
            raise InputError(f"expected at least one finite score of {name}, got {tuple(scores.shape)}")
    # the last factor keeps 29 % of 100 at 29 despite rounding
    allowed = math.floor(fpr * negatives.numel() / 100 * (1 + 1e-12))
    threshold = negatives.flatten().sort(descending=True).values[allowed]
    return 100 * (positives > threshold).double().mean().item()


def _check_fpr(fpr: float) -> None:
    if not 0 <= check_number("fpr", fpr) < 100:
        raise InputError(f"expected fpr in percent, at least 0 and below 100, got {describe(fpr)}")


def _gaussian(shadows: Tensor, fixed_variance: bool) -> tuple[Tensor, Tensor]:
    """Return the mean (examples,) and the variance, (examples,) or (), of shadows (models, examples)."""
    variance = shadows.var(dim=0, correction=1)
    if fixed_variance:
        variance = variance.mean()
    return shadows.mean(dim=0), variance.clamp(min=VARIANCE_FLOOR)


def _log_likelihood(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return log-likelihoods under Gaussians without the constant log(2 pi) / 2, which cancels in a ratio."""
    return -((values - mean).square() / variance + variance.log()) / 2


def _share_above_zero(scores: Tensor) -> float:
    return ((scores > 0).double() + (scores == 0).double() / 2).mean().item()


def _without(models: Tensor, i: int) -> Tensor:
    return torch.cat([models[:i], models[i + 1 :]])


def _check_shadows(shadows: dict[str, Tensor], minimum: int) -> None:
    check_tensors(**shadows)
    for name, values in shadows.items():
        if values.ndim != 2:
            raise InputError(f"{name}: expected (models, examples), got {tuple(values.shape)}")
        if len(values) < minimum:
            raise InputError(
                f"{name}: expected at least {minimum} models for the attack's shadows, got {len(values)}; train more"
            )
    examples = next(iter(shadows.values())).shape[1]
    for name, values in shadows.items():
        _check_values(name, values, examples)


def _check_values(name: str, values: Tensor, examples: int) -> None:
    check_tensors(**{name: values})
    if values.ndim not in (1, 2) or not values.numel() or values.shape[-1] != examples:
        raise InputError(
            f"{name}: expected the same examples for every model, at least one, {examples} as in the first array, "
            f"got {tuple(values.shape)}"
        )
    if not values.is_floating_point() or not values.isfinite().all():
        raise InputError(
            f"{name}: expected finite logit-scaled confidences, got {values.dtype} with NaN, infinity or integers; "
            "see delfast.evaluation.logit_confidences"
        )
