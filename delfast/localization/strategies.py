"""Localization in one call: ``localize``, with the strategies and presets that it takes by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

from torch import nn
from torch.utils.data import Dataset

from delfast.arguments import check_seed, describe
from delfast.batches import LossFn
from delfast.deprecation import renamed
from delfast.errors import InputError, check_choice
from delfast.localization.anytime import BATCH_SIZE, check_batch_size, check_stop, localize_until_stable
from delfast.localization.scores import (
    Aggregate,
    Criterion,
    Granularity,
    Policy,
    check_criterion,
    check_selection,
    score,
)
from delfast.mask import Mask
from delfast.plain import unboxed

Preset = Literal["paper", "published-code"]
BUDGET = 0.3  # fraction of all parameters; DEL paper, experimental setup

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"granularity": "channel", "aggregate": "topk_mean", "top_h": 0.1, "policy": "whole"},
    "published-code": {
        "granularity": "channel",
        "aggregate": "topk_mean",
        "top_h": "published",
        "policy": "exact",
    },
}

STRATEGIES: dict[str, dict[str, Any]] = {
    "del": {"criterion": "weighted_grad", "granularity": "channel"},
    "salloc": {"criterion": "grad", "granularity": "param"},
    "param-weighted": {"criterion": "weighted_grad", "granularity": "param"},
    "channel-unweighted": {"criterion": "grad", "granularity": "channel"},
    "weight": {"criterion": "weight", "granularity": "channel"},
    "weighted-grad-all": {"criterion": "weighted_grad", "granularity": "channel"},
    "random": {"criterion": "random", "granularity": "channel"},
    "random-param": {"criterion": "random", "granularity": "param"},
    "shallowest": {"criterion": "shallowest", "granularity": "channel"},
    "deepest": {"criterion": "deepest", "granularity": "channel"},
    "critmem": {"criterion": "critmem", "granularity": "channel"},
}
"""The localizations that the DEL paper compares, by name: arguments of ``localize``.

====================  ===========================================================================================
``del``               the paper's method; its table 1 varies criterion and granularity in the next three
``salloc``            the localization of SalUn (Fan et al., ICLR 2024)
``param-weighted``    DEL's criterion for single parameters
``channel-unweighted``  the gradient alone for channels
``weight``            the weights alone, which depend on no set (table 4)
``weighted-grad-all``   the arguments of ``del``; pass the loader of the whole training set (table 4)
``random``            the control of table 3; ``random-param`` for single parameters
``shallowest``        the first parameters of the model; ``deepest`` the last
``critmem``           channels by the greedy search of Maini et al. (ICML 2023)
====================  ===========================================================================================
"""

WHOLE_TRAINING_SET = frozenset({"weighted-grad-all"})  # strategies whose loader is that of the whole training set


def preset_settings(preset: Preset, **overrides: Any) -> dict[str, Any]:
    """The arguments of ``Scores.select`` that a preset stands for, with ``overrides``; InputError if there is none."""
    check_choice("preset", preset, Preset)
    return {**PRESETS[preset], **overrides}


def check_localize(
    budget: float,
    *,
    strategy: str = "del",
    preset: Preset | None = None,
    criterion: Criterion | None = None,
    granularity: Granularity | None = None,
    aggregate: Aggregate | None = None,
    top_h: int | float | Literal["published"] | None = None,
    policy: Policy | None = None,
    per_example: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    stop_when_stable: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[Criterion, dict[str, Any]]:
    """Resolve and check the arguments of ``localize``: the criterion, and the arguments of ``Scores.select``.

    InputError for everything that ``localize`` refuses whatever the model and the set.
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise InputError(f"expected strategy to be one of {', '.join(STRATEGIES)}; got {describe(strategy)}")
    given = {
        "criterion": criterion,
        "granularity": granularity,
        "aggregate": aggregate,
        "top_h": unboxed(top_h),
        "policy": policy,
    }
    settings = preset_settings("paper" if preset is None else preset, **STRATEGIES[strategy])
    settings |= {name: value for name, value in given.items() if value is not None}
    criterion = cast(Criterion, settings.pop("criterion"))
    check_criterion(criterion, per_example, loss_fn)
    check_selection(unboxed(budget), criterion=criterion, **settings)
    check_seed(unboxed(seed))
    check_batch_size(unboxed(batch_size))
    if stop_when_stable is not None:
        check_stop(unboxed(stop_when_stable), criterion)
    return criterion, settings


@renamed(forget_loader="forget")
def localize(
    model: nn.Module,
    forget: Iterable[Any] | Dataset[Any] | None,
    budget: float = BUDGET,
    *,
    strategy: str = "del",
    preset: Preset | None = None,
    criterion: Criterion | None = None,
    granularity: Granularity | None = None,
    aggregate: Aggregate | None = None,
    top_h: int | float | Literal["published"] | None = None,
    policy: Policy | None = None,
    per_example: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    stop_when_stable: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Mask:
    """``score`` and ``Scores.select`` in one call.

    (DOC)
    """
    criterion_name, settings = check_localize(
        budget,
        strategy=strategy,
        preset=preset,
        criterion=criterion,
        granularity=granularity,
        aggregate=aggregate,
        top_h=top_h,
        policy=policy,
        per_example=per_example,
        loss_fn=loss_fn,
        seed=seed,
        stop_when_stable=stop_when_stable,
        batch_size=batch_size,
    )
    budget, seed, stop_when_stable, batch_size = unboxed((budget, seed, stop_when_stable, batch_size))
    options: dict[str, Any] = {"per_example": bool(per_example), "loss_fn": loss_fn, "seed": check_seed(seed)}
    if stop_when_stable is not None:
        selection = localize_until_stable(
            model, forget, criterion_name, budget, settings, stop_when_stable, batch_size, **options
        )
    else:
        selection = score(model, cast(Any, forget), criterion_name, **options).choose(budget, **settings)
    selection.check(stacklevel=4)  # the caller of localize, past the decorator's frame
    metadata = {**selection.mask.metadata, "preset": preset or "paper"}
    if criterion is None and granularity is None:
        metadata["strategy"] = strategy
    return Mask(selection.mask.parameters, metadata)
