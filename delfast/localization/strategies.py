"""Localization in one call: ``localize``, and the strategies and presets that it accepts by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from delfast.arguments import check_choice, check_count, check_seed, describe
from delfast.batches import LossFn
from delfast.deprecation import renamed
from delfast.errors import InputError
from delfast.execution import ChannelsLast, CudaGraphs, Execution, Precision
from delfast.groups import Group
from delfast.joint_calls import one_error
from delfast.localization.anytime import BATCH_SIZE, check_stop, localize_until_stable
from delfast.localization.competing import Patterns, check_patterns
from delfast.localization.criteria import (
    Aggregate,
    Criterion,
    Granularity,
    Policy,
    check_criterion,
    check_selection,
)
from delfast.localization.scoring import score
from delfast.localization.streaming import streamed_scores
from delfast.mask import Mask
from delfast.plain import unboxed

Preset = Literal["paper", "published-code"]
BUDGET = 0.3  # fraction of all elements; DEL paper, experimental setup

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
"""The localizations that the DEL paper compares, by name: the criterion and the granularity of each.

- ``"del"``: the paper's method. The next three change its criterion or granularity (table 1).
- ``"salloc"``: the localization of SalUn (Fan et al., ICLR 2024).
- ``"param-weighted"``: DEL's criterion for single elements.
- ``"channel-unweighted"``: the gradient alone, for channels.
- ``"weight"``: the weights alone, independent of the forget set (table 4).
- ``"weighted-grad-all"``: the arguments of ``"del"``. Pass the loader of the whole training set (table 4).
- ``"random"``, ``"random-param"``: random channels, random parameters (the control of table 3).
- ``"shallowest"``, ``"deepest"``: the first parameters of the model, the last ones.
- ``"critmem"``: channels found by the search of Maini et al. (ICML 2023); see ``critmem``.
"""

WHOLE_TRAINING_SET = frozenset({"weighted-grad-all"})
"""The strategies whose gradient is a mean over the whole training set. Pass ``localize`` that set's loader."""


def preset_settings(preset: Preset, **overrides: Any) -> dict[str, Any]:
    """Return the arguments of ``Scores.select`` that a preset stands for.

    Parameters
    ----------
    preset : {"paper", "published-code"}
        The name of the preset; see ``localize``.
    **overrides : Any
        Arguments that replace those of the preset.

    Returns
    -------
    dict[str, Any]
        Keyword arguments of ``Scores.select``.

    Raises
    ------
    InputError
        If there is no preset of this name.

    Examples
    --------
    >>> from delfast.localization import preset_settings
    >>> preset_settings("paper", top_h=0.2)
    {'granularity': 'channel', 'aggregate': 'topk_mean', 'top_h': 0.2, 'policy': 'whole'}
    """
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
    """Check the arguments of ``localize`` that depend on no model and no set, and resolve their defaults.

    Parameters
    ----------
    budget : float
        See ``localize``, also for the other parameters.
    strategy : str, default "del"
        The name of a strategy, a key of ``STRATEGIES``.
    preset : {"paper", "published-code"} or None, default None
        The name of a preset; None means "paper".
    criterion : str or None, default None
        Replaces the strategy's criterion.
    granularity : {"param", "channel"} or None, default None
        Replaces the strategy's granularity.
    aggregate : {"topk_mean", "mean", "sum", "max"} or None, default None
        Replaces the preset's aggregate.
    top_h : int, float, "published" or None, default None
        Replaces the preset's ``top_h``.
    policy : {"whole", "exact"} or None, default None
        Replaces the preset's policy.
    per_example : bool, default False
        Whether each example is scored by its own gradient.
    loss_fn : callable or None, default None
        The caller's loss function.
    seed : int, default 0
        In [0, 2**64).
    stop_when_stable : float or None, default None
        The overlap at which to stop, in (0, 1].
    batch_size : int, default 128
        The number of examples in a batch.

    Returns
    -------
    criterion : str
        The criterion for ``score``.
    settings : dict[str, Any]
        The keyword arguments of ``Scores.select``, without the budget.

    Raises
    ------
    InputError
        For an argument that ``localize`` refuses for every model and every set.

    Examples
    --------
    >>> from delfast.localization import check_localize
    >>> check_localize(0.3, strategy="salloc", preset="published-code")[0]
    'grad'
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
    check_count("batch_size", batch_size)
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
    precision: Precision = "fp32",
    channels_last: ChannelsLast = "auto",
    cuda_graphs: CudaGraphs = "auto",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    sum_dtype: torch.dtype | None = None,
    group: Group = None,
) -> Mask:
    """Find the channels or elements most critical for a forget set: ``score`` and ``Scores.select`` in one call.

    A strategy sets the criterion and the granularity, a preset the rest. An argument that is given replaces theirs.
    The model runs in eval mode and is left as it was; see ``score``.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model.
    forget : iterable of batches, Dataset or None
        The forget set: a DataLoader or another re-iterable of batches, as in ``score``. With ``stop_when_stable`` a
        map-style data set (anything with a length and items 0 to length - 1), or a DataLoader of one. None is accepted
        for the criteria that read no example: "weight", "random", "shallowest", "deepest". The strategy
        "weighted-grad-all" expects the loader of the whole training set.
    budget : float, default 0.3
        The fraction of the competing parameters' elements to select, in (0, 1]. The default is the DEL paper's.
    strategy : str, default "del"
        The name of a criterion and a granularity, a key of ``STRATEGIES``.
    preset : {"paper", "published-code"} or None, default None
        How scores become a mask. "paper", which None means: the mean of the highest tenth of each channel's scores, and
        whole channels within the budget (DEL paper, section 3). "published-code": what the authors' code computes from
        the same gradient; see Notes.
    criterion : str or None, default None
        The element score; see ``score``.
    granularity : {"param", "channel"} or None, default None
        What competes; see ``Scores.select``.
    aggregate : {"topk_mean", "mean", "sum", "max"} or None, default None
        How a channel's score is computed from its elements' scores; see ``Scores.select``.
    top_h : int, float, "published" or None, default None
        The number of elements for "topk_mean"; see ``Scores.select``.
    policy : {"whole", "exact"} or None, default None
        Whether the last channel may be cut; see ``Scores.select``.
    per_example : bool, default False
        Score each example by its own gradient; see ``score``.
    loss_fn : callable or None, default None
        ``loss_fn(model, batch)`` returns per-example losses of shape (N,). None means cross-entropy.
    seed : int, default 0
        The seed, in [0, 2**64), of the criterion "random" and of the order of the examples with ``stop_when_stable``.
    stop_when_stable : float or None, default None
        Stop at the first n for which the masks after n and after 2n examples overlap by this Jaccard index
        ``|A ∩ B| / |A ∪ B|``, in (0, 1]. n starts at ``batch_size``. Examples are read in a seeded order, each at most
        once. None uses all examples.
    batch_size : int, default 128
        The number of examples in a batch with ``stop_when_stable``. If it is omitted, a DataLoader keeps its own batch
        size. Without ``stop_when_stable`` it has no effect.
    precision : {"fp32", "bf16"}, default "fp32"
        "bf16" runs the forward passes under ``torch.autocast``; sums over examples stay in float32.
    channels_last : {"auto", True, False}, default "auto"
        Whether images (N, C, H, W) are laid out channels-last. "auto" follows the model's convolution weights.
    cuda_graphs : {"auto", True, False}, default "auto"
        Whether to replay the passes as CUDA graphs. "auto" does so on a GPU for at least 8 batches of a shape, without
        a ``loss_fn``. True states that the ``loss_fn`` is a pure function of tensors. Networks of DTensors run without.
    include : str or sequence of str, optional
        Glob patterns of the names of parameters that compete, such as "*.mlp.*"; see ``score``.
    exclude : str or sequence of str, optional
        Patterns of the names of parameters that do not compete, such as ["*embed*", "lm_head.*"]; see ``score``.
    sum_dtype : torch.dtype or None, default None
        The dtype in which gradients are summed over batches and processes; see ``score``.
    group : ProcessGroup, DeviceMesh or None, default None
        The processes over which the data differ. They share the set and all get the same mask, that of the whole model;
        see ``score``. Refused with ``stop_when_stable``. None: this process reads the whole set. Plain parameters are
        then localized by this process alone, also inside DistributedDataParallel: nothing is exchanged.

    Returns
    -------
    Mask
        The selected elements. The metadata store every setting, and ``strategy`` unless ``criterion`` or
        ``granularity`` was given. With ``stop_when_stable`` they also store the number of ``examples`` that were used,
        ``examples_available`` and the last ``overlap``; with ``group`` the number of ``processes``.

    Raises
    ------
    InputError
        As ``score`` and ``Scores.select``, and for an unknown strategy or preset. Arguments are checked before anything
        is computed.

    Warns
    -----
    UserWarning
        If some of the selected elements score 0.
    DeprecationWarning
        If the forget set is passed under its former name ``forget_loader``.

    Notes
    -----
    The preset "published-code" takes h = int(0.1 C_out) and selects int(budget × P) elements, so the last channel may
    be cut. For transformers that code uses ``aggregate="mean"``, which the caller passes. Differences from that code:
    sorting is stable; G is the mean over every example, where that code shuffles the forget set, drops the last batch
    and sums batch means; h is at least 1, where that code scores a head of fewer than 10 outputs NaN and never selects
    it; h is at most a channel's number of elements, where that code fails on depthwise convolutions; and frozen
    parameters and forget sets smaller than a batch are accepted.

    ``score(...).select(budget)`` accepts the arguments that only ``score`` has (``max_channels``).

    References
    ----------
    .. [1] Torkzadehmahani et al., "Improved Localized Machine Unlearning Through the Lens of Memorization",
       TMLR 2025, arXiv 2412.02432.

    Examples
    --------
    >>> import torch, delfast
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> forget = [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))]
    >>> mask = delfast.localize(model, forget, budget=0.3)
    >>> mask.fraction <= 0.3, mask.metadata["strategy"]
    (True, 'del')
    >>> delfast.localize(model, forget, strategy="salloc").metadata["criterion"]
    'grad'
    """
    with one_error(group, model) as processes:
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
        execution = Execution(precision, channels_last, cuda_graphs)
        execution.check()
        options: dict[str, Any] = {"per_example": bool(per_example), "loss_fn": loss_fn, "seed": check_seed(seed)}
        patterns = check_patterns(include, exclude)
        if stop_when_stable is not None:
            if group is not None or sum_dtype is not None:
                raise InputError(
                    "expected neither group nor sum_dtype with stop_when_stable, got one; omit stop_when_stable, and "
                    "all examples are used"
                )
            selection = localize_until_stable(
                model,
                forget,
                criterion_name,
                budget,
                settings,
                stop_when_stable,
                batch_size,
                execution=execution,
                patterns=patterns,
                **options,
            )
        else:
            scores = None
            if settings["granularity"] == "channel" and not per_example and sum_dtype is None and group is None:
                units = (settings["aggregate"], settings["top_h"])
                scores = streamed_scores(
                    model, forget, criterion_name, units, loss_fn, options["seed"], execution, patterns
                )
            if scores is None:
                options |= {**asdict(execution), **patterns, "sum_dtype": sum_dtype, "group": group}
                scores = score(model, cast(Any, forget), criterion_name, **options)
            selection = scores.choose(budget, **settings, processes=processes)
    selection.check(stacklevel=4)  # the caller of localize, past the decorator's frame
    metadata = {**selection.mask.metadata, "preset": preset or "paper"}
    if criterion is None and granularity is None:
        metadata["strategy"] = strategy
    return Mask(selection.mask.parameters, metadata)
