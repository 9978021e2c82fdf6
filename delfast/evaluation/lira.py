"""U-LiRA: can an attacker, example by example, tell an unlearned network from one that never saw the example?

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

# Of logit-scaled confidences: a deviation of 0.001, well above float32's rounding of logits. It keeps the likelihoods
# of networks that agree with one another finite.
VARIANCE_FLOOR = 1e-6
MIN_SHADOWS = 2  # of each kind: a variance needs two


@dataclass(frozen=True)
class ULira:
    """What the attack finds; all percentages 0-100.

    ``accuracy``: of the calls, the mean over the two kinds: 50 where unlearning is perfect, 100 where every call is
    right; a score of 0 counts as half right. ``tpr``: the part of the unlearned found at a threshold that at most
    ``fpr`` of the retrained pass. Scores: float64 log-likelihood ratios in nats, in the shape of what was attacked;
    above 0, "trained on the example, then made to unlearn it" is the more likely.
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
    """Attack networks of both kinds with the Gaussians that shadow networks of each kind give every example.

    ``unlearned``, ``retrained``: (models, examples) logit-scaled confidences (``logit_confidences``) of the shadows:
    networks that were trained on the examples and then unlearned them, and networks that were trained without them.
    (Where probabilities p are all there is: ``torch.logit(p)``, infinite where p has rounded to 0 or 1.)
    ``attacked_unlearned``, ``attacked_retrained``: (examples,) or (models, examples) of networks of either kind that
    are not among the shadows; ``u_lira_leave_one_out`` makes each shadow such a one in turn. An example's score is
    log N(x; its unlearned shadows' mean, variance) - log N(x; its retrained shadows' mean, variance).

    ``fixed_variance``: for each kind, one variance for all examples, the mean of theirs: LiRA's remedy where there are
    too few shadows to estimate each example's own. Variances are unbiased (n - 1), and not below ``VARIANCE_FLOOR``.

    ``fpr``: percent, in [0, 100). Raises InputError for fewer than two shadows of a kind, no example, arrays of
    different examples and values that are not finite.
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
    """``u_lira`` on every pair of an unlearned and a retrained network, with all the others as shadows.

    Where networks are too costly to set some apart. They leave in pairs, the i-th of each kind: were one left out
    alone, the other kind's Gaussian, of one shadow more, would fit better, and perfect unlearning come out below 50.
    Where one kind has more, its last are shadows always. Scores: (pairs, examples). Arguments and errors as for
    ``u_lira``, but at least three networks of each kind.
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


def tpr_at_fpr(positives: Tensor, negatives: Tensor, fpr: float) -> float:
    """Percentage of ``positives`` above the lowest threshold that at most ``fpr`` percent of ``negatives`` are above.

    Scores of any shape. With fewer than 100 / fpr negatives none may be above. Raises InputError for an empty or
    non-finite set of scores, and an ``fpr`` outside [0, 100).
    """
    _check_fpr(fpr)
    check_tensors(positives=positives, negatives=negatives)
    for name, scores in {"positives": positives, "negatives": negatives}.items():
        if not scores.numel() or not scores.isfinite().all():
            raise InputError(f"expected one or more finite scores of {name}, got {tuple(scores.shape)}")
    allowed = math.floor(fpr * negatives.numel() / 100 * (1 + 1e-12))  # 29 % of 100 is 29 in spite of rounding
    threshold = negatives.flatten().sort(descending=True).values[allowed]
    return 100 * (positives > threshold).double().mean().item()


def _check_fpr(fpr: float) -> None:
    if not 0 <= check_number("fpr", fpr) < 100:
        raise InputError(f"expected fpr in percent, at least 0 and below 100, got {describe(fpr)}")


def _gaussian(shadows: Tensor, fixed_variance: bool) -> tuple[Tensor, Tensor]:
    """(models, examples) to the mean (examples,) and the variance (examples,) or ()."""
    variance = shadows.var(dim=0, correction=1)
    if fixed_variance:
        variance = variance.mean()
    return shadows.mean(dim=0), variance.clamp(min=VARIANCE_FLOOR)


def _log_likelihood(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of Gaussians, but for the constant log(2 pi) / 2, which cancels in a ratio."""
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
            f"{name}: expected the same examples, one or more, for every model, {examples} as in the first array, "
            f"got {tuple(values.shape)}"
        )
    if not values.is_floating_point() or not values.isfinite().all():
        raise InputError(
            f"{name}: expected finite logit-scaled confidences, got {values.dtype} with NaN, infinity or integers; "
            "see delfast.evaluation.logit_confidences"
        )
