"""Localization in one call: the strategies and presets by name, and ``localize``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

from torch import nn
from torch.utils.data import Dataset

from delfast.arguments import check_choice, check_seed
from delfast.batches import LossFn
from delfast.localization.anytime import check_batch_size, localize_until_stable
from delfast.localization.scores import Criterion, check_criterion, check_selection, score
from delfast.mask import Mask
from delfast.plain import unboxed

Preset = Literal["paper", "published-code"]
BUDGET = 0.3  # part of all parameters; DEL paper, experimental setup

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
    "weighted-grad-all": {"criterion": "weighted_grad_all", "granularity": "channel"},
    "random": {"criterion": "random", "granularity": "channel"},
    "random-param": {"criterion": "random", "granularity": "param"},
    "shallowest": {"criterion": "shallowest", "granularity": "channel"},
    "deepest": {"criterion": "deepest", "granularity": "channel"},
    "critmem": {"criterion": "critmem", "granularity": "channel"},
}
"""The localizations that the DEL paper compares, by name: arguments of ``localize``. "del" to "channel-unweighted" are
the 2 x 2 of its table 1, "salloc" the localization of SalUn; "random" is the control of table 3; "weight" and
"weighted-grad-all", which do not look at the forget set alone, are of table 4. The latter is "del" but for its loader,
which must be that of the whole training set.
"""


def preset_settings(preset: Preset, **overrides: Any) -> dict[str, Any]:
    """The arguments of ``Scores.select`` that a preset stands for, with ``overrides``; InputError if there is none."""
    check_choice("preset", preset, Preset)
    return {**PRESETS[preset], **overrides}


def localize(
    model: nn.Module,
    forget_loader: Iterable[Any] | Dataset[Any] | None,
    budget: float = BUDGET,
    *,
    preset: Preset = "paper",
    criterion: Criterion = "weighted_grad",
    per_example: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    stop_when_stable: float | None = None,
    batch_size: int | None = None,
    **overrides: Any,
) -> Mask:
    """``score`` and ``Scores.select`` in one call. ``overrides``: granularity, aggregate, top_h, policy. (What only
    ``score`` takes, as "critmem"'s ``max_channels``: ``score(...).select(budget)``.)

    stop_when_stable: take only as many examples as the mask needs: a bound in (0, 1] on the Jaccard overlap |A ∩ B| /
        |A ∪ B| of the masks after n and after 2n examples. ``forget_loader`` is then a map-style data set (a Dataset, a
        Subset, a list of examples, a Hugging Face Dataset: anything with a length and items 0 to length - 1), or a
        DataLoader of one, whose ``collate_fn`` and workers are kept. Its examples are gone through in an order drawn
        from ``seed``, ``batch_size`` at a time (default: the DataLoader's, else 128); n starts at ``batch_size``. The
        mask's metadata says how many ``examples`` were taken, of how many, and what the last overlap was.

    Presets:
        "paper": DEL as the paper describes it (section 3): channels, the mean of the highest tenth of each, whole
            channels within the budget.
        "published-code": what the authors' code computes from the same G, with stable sorting: h = int(0.1 C_out),
            and int(budget × P) elements, so that the last channel may be cut. (For transformers that code takes
            aggregate="mean": pass it.) Not kept of that code: it shuffles the forget set, drops its last batch and
            sums batch means (G here is the mean over every example); a head of fewer than 10 outputs, h = 0, scores
            NaN there and is never selected (here h is at least 1); and it crashes on depthwise convolutions (h
            longer than the row: clipped here), frozen parameters (left out here) and forget sets below one batch.

    Raises InputError as ``score`` and ``Scores.select`` do; bad arguments are refused before anything is computed.
    """
    settings = {name: unboxed(value) for name, value in preset_settings(preset, **overrides).items()}
    budget, seed, stop_when_stable, batch_size = unboxed((budget, seed, stop_when_stable, batch_size))
    check_criterion(criterion, per_example, loss_fn)
    per_example = bool(per_example)  # numpy's too
    check_selection(budget, criterion=criterion, **settings)
    seed = check_seed(seed)
    if batch_size is not None:
        check_batch_size(batch_size)
    options: dict[str, Any] = {"per_example": per_example, "loss_fn": loss_fn, "seed": seed}
    if stop_when_stable is not None:
        selection = localize_until_stable(
            model, forget_loader, criterion, budget, settings, stop_when_stable, batch_size, **options
        )
    else:
        selection = score(model, cast(Any, forget_loader), criterion, **options).choose(budget, **settings)
    selection.check()
    return Mask(selection.mask.parameters, {**selection.mask.metadata, "preset": preset})
