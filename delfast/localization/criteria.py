"""The choices of localization by name, and the checks of arguments that depend on no model and no set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from delfast.arguments import check_choice, check_flag, check_function, check_number, describe
from delfast.batches import LossFn
from delfast.errors import InputError
from delfast.ops.layout import row_length
from delfast.plain import unboxed

Criterion = Literal["weighted_grad", "grad", "squared_grad", "weight", "random", "critmem", "shallowest", "deepest"]
BY_DEPTH = ("shallowest", "deepest")
WITHOUT_SET = ("weight", "random", *BY_DEPTH)
WITHOUT_MEAN = (*WITHOUT_SET, "critmem")  # criteria that are no mean over the examples
CHANNELS_ONLY = ("critmem", *BY_DEPTH)
Granularity = Literal["param", "channel"]
Aggregate = Literal["topk_mean", "mean", "sum", "max"]
Policy = Literal["whole", "exact"]


def check_criterion(criterion: str, per_example: bool, loss_fn: LossFn | None = None) -> None:
    """Raise InputError unless ``criterion`` exists and accepts this ``per_example`` and this ``loss_fn``."""
    if criterion == "weighted_grad_all":
        raise InputError(
            "expected a criterion, got 'weighted_grad_all', which 0.2 removed; pass strategy='weighted-grad-all' to "
            "localize, or criterion='weighted_grad' to score, with the loader of the whole training set"
        )
    check_choice("criterion", criterion, Criterion)
    check_flag("per_example", per_example)
    check_function("loss_fn", loss_fn)
    if criterion == "squared_grad" and not per_example:
        raise InputError("expected per_example=True for criterion 'squared_grad', got False; pass per_example=True")
    if criterion == "critmem" and loss_fn is not None:
        raise InputError("expected no loss_fn for criterion 'critmem', got one; call critmem(logits_fn=...) instead")
    if criterion in WITHOUT_MEAN and per_example:
        raise InputError(f"expected a criterion with a gradient for per_example=True, got '{criterion}'; omit one")


def check_selection(
    budget: float,
    granularity: str = "channel",
    aggregate: str = "topk_mean",
    top_h: object = 0.1,
    policy: str = "whole",
    *,
    criterion: str = "weighted_grad",
) -> None:
    """Check the arguments of ``Scores.select`` that can be checked without scores.

    Parameters
    ----------
    budget : float
        The fraction of the competing parameters' elements, in (0, 1].
    granularity : {"channel", "param"}, default "channel"
        What competes.
    aggregate : {"topk_mean", "mean", "sum", "max"}, default "topk_mean"
        How a channel's score is computed.
    top_h : int, float or "published", default 0.1
        A count of at least 1, a fraction in (0, 1], or "published".
    policy : {"whole", "exact"}, default "whole"
        Whether the last channel may be cut.
    criterion : str, default "weighted_grad"
        The criterion of the scores.

    Raises
    ------
    InputError
        For an argument that ``Scores.select`` refuses for every scores.

    Examples
    --------
    >>> from delfast.localization import check_selection
    >>> check_selection(0.3, granularity="param")
    """
    if not 0 < check_number("budget", budget) <= 1:
        raise InputError(f"expected a budget in (0, 1], got {budget}; pass the fraction of parameters to select")
    check_choice("granularity", granularity, Granularity)
    check_choice("aggregate", aggregate, Aggregate)
    check_choice("policy", policy, Policy)
    resolve_top_h(unboxed(top_h), (1, 1))
    if criterion in CHANNELS_ONLY and granularity == "param":
        raise InputError(f"criterion '{criterion}' scores channels, not their elements; use granularity='channel'")


def resolve_top_h(top_h: object, shape: Sequence[int], dim: int = 0) -> int:
    """Return h for a parameter of this shape, whose channels lie along ``dim``, clipped to [1, elements of a channel].

    Raises InputError if ``top_h`` is neither a count nor a fraction nor "published".
    """
    length = max(1, row_length(shape, dim))
    if isinstance(top_h, str) and top_h == "published":
        h = int(0.1 * shape[dim]) if len(shape) > 1 else 1
    elif isinstance(top_h, int) and not isinstance(top_h, bool) and top_h >= 1:
        h = top_h
    elif isinstance(top_h, float) and 0 < top_h <= 1:
        h = math.floor(top_h * length)
    else:
        raise InputError(
            f"expected top_h to be a count (int >= 1), a fraction in (0, 1] or 'published', got {describe(top_h)}"
        )
    return min(max(h, 1), length)
