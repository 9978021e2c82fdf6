"""The thresholds under which a ledger accepts an unlearned model, and advice where one does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delfast.errors import InputError
from delfast.ledger.results import Check

if TYPE_CHECKING:  # imports torch
    from delfast.jobs import Accept

MIN_REFERENCES = 2  # the variance of LiRA's Gaussians, and an interval of the relearning ratio, need two


def refuse_unmeasurable(accept: Accept, has_accuracy: bool, references: Callable[[], Sequence[Any]]) -> None:
    """Raise InputError for a threshold that this job or ledger cannot measure."""
    if accept.test_drop is not None and not has_accuracy:
        raise InputError(
            "expected accuracies for the threshold test_drop, a job with a loss_fn has none; "
            "define accept in the job file without test_drop"
        )
    if accept.relearn_ratio is not None and len(references()) < MIN_REFERENCES:
        raise InputError(
            f"expected at least {MIN_REFERENCES} references for the threshold relearn_ratio, the ledger has "
            f"{len(references())}; train them: delfast ledger references --count 8, "
            "or define accept in the job file without relearn_ratio"
        )


def check_all(
    accept: Mapping[str, float | None],
    first_test_accuracy: float | None,
    verified: Mapping[str, Any],
    audited: Mapping[str, Any],
) -> list[Check]:
    """Return a check of the comparison with the mask, and of each threshold that is asked for.

    The test accuracy is compared with that of the ledger's first model, so that small losses cannot add up unnoticed.
    The attack's advantage is the largest over the new forget set and all earlier ones.
    """
    sets: dict[str, Any] = audited["figures"]["sets"]
    found = [Check("outside_mask", verified["outside"], 0, verified["outside"] == 0, "model")]
    if accept["test_drop"] is not None:
        drop = _drop(first_test_accuracy, sets["test"]["accuracy"])
        found.append(_check("test_drop", drop, accept["test_drop"], "test"))
    if accept["attack_advantage"] is not None:
        forgotten = [name for name in sets if name == "forget" or name.startswith("run ")]
        # a set whose attack could not be measured comes first: its threshold does not hold
        worst = max(forgotten, key=lambda name: _or_infinite(sets[name]["attack_advantage"]))
        found.append(_check("attack_advantage", sets[worst]["attack_advantage"], accept["attack_advantage"], worst))
    if accept["relearn_ratio"] is not None:
        ratio = audited["figures"]["relearn_ratio"]
        found.append(_check("relearn_ratio", ratio, accept["relearn_ratio"], "forget"))
    return found


def _check(name: str, figure: Mapping[str, Any] | None, limit: float, where: str) -> Check:
    if figure is None:
        return Check(name, None, limit, False, where)
    return Check(name, figure["value"], limit, figure["value"] <= limit, where, figure["low"], figure["high"])


def _drop(before: float | None, after: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    """Return the loss of accuracy (percentage points), with the interval of the accuracy after."""
    if before is None or after is None:
        return None
    ends = {"value": after["value"], "low": after["high"], "high": after["low"]}
    return {name: None if end is None else before - end for name, end in ends.items()}


def _or_infinite(figure: Mapping[str, Any] | None) -> float:
    return math.inf if figure is None else float(figure["value"])


HELP = {
    "outside_mask": "entries outside the mask changed: a load or save of the job that alters weights, or a fault",
    "test_drop": "the model lost test accuracy: a smaller budget, more epochs, or retraining",
    "attack_advantage": "the forget set still stands out: a larger budget, more epochs, another method, or retraining",
    "relearn_ratio": "the forget set is hidden, not gone: a larger budget, another method, or retraining",
}
TOO_FEW = "its interval includes 1, a network that never saw them: take up more requests, or train more references"


def advice(checks: Sequence[Check], settings: Mapping[str, Any], *, escalated: bool) -> list[str]:
    """Return a line for each check that does not hold: what failed and what would help."""
    lines = []
    for check in checks:
        if check.held:
            continue
        if check.name == "method":
            lines.append(f"{settings['method']} failed: {check.set}")
        elif check.value is None:
            lines.append(
                f"{check.name} of '{check.set}' could not be measured: too few examples; take up more requests"
            )
        else:
            found = f"{check.name} of '{check.set}' is {check.value:.4g}, the limit is {check.limit:.4g}"
            few = check.name == "relearn_ratio" and check.low is not None and check.low <= 1
            lines.append(f"{found}; {TOO_FEW if few else HELP[check.name]}")
    if not escalated:
        lines.append("--escalate tries the settings of the job file in order, retraining last")
    return lines
