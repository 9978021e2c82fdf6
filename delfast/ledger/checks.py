"""The thresholds under which a ledger accepts an unlearned model, and advice where one does not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delfast.errors import InputError
from delfast.ledger.results import Check
from delfast.ledger.words import failure

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
    *,
    accept_unmeasured: bool = False,
) -> list[Check]:
    """Return a check of the comparison with the mask, and of each threshold that is asked for.

    The test accuracy is compared with that of the ledger's first model, so that small losses cannot add up unnoticed.
    The attack's advantage is the largest over the new forget set and all earlier ones that it can be measured on. A
    figure that could not be measured holds with ``accept_unmeasured`` alone.
    """
    sets: dict[str, Any] = audited["figures"]["sets"]
    found = [Check("outside_mask", verified["outside"], 0, verified["outside"] == 0, "model")]
    if accept["test_drop"] is not None:
        drop = _drop(first_test_accuracy, sets["test"]["accuracy"])
        found.append(_check("test_drop", drop, accept["test_drop"], "test", accept_unmeasured))
    if accept["attack_advantage"] is not None:
        advantages = {name: each["attack_advantage"] for name, each in sets.items() if name.startswith("run ")}
        measured = {name: each for name, each in advantages.items() if each is not None}
        new = sets["forget"]["attack_advantage"]
        if new is not None or not (measured and accept_unmeasured):
            measured["forget"] = new  # without a figure it is the worst; earlier sets were accepted as they were
        worst = max(measured, key=lambda name: _or_infinite(measured[name]))
        limit = accept["attack_advantage"]
        found.append(_check("attack_advantage", measured[worst], limit, worst, accept_unmeasured))
    if accept["relearn_ratio"] is not None:
        ratio = audited["figures"]["relearn_ratio"]
        found.append(_check("relearn_ratio", ratio, accept["relearn_ratio"], "forget", accept_unmeasured))
    return found


def _check(name: str, figure: Mapping[str, Any] | None, limit: float, where: str, accept_unmeasured: bool) -> Check:
    if figure is None:
        return Check(name, None, limit, accept_unmeasured, where)
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
    "outside_mask": "The job's load or save alters weights, or delfast has a fault",
    "test_drop": "The model lost test accuracy. Try a smaller budget, more epochs, or retraining",
    "attack_advantage": "The examples still stand out. Try a larger budget, more epochs, another method, or retraining",
    "relearn_ratio": "The examples are hidden, not gone. Try a larger budget, another method, or retraining",
}
TOO_FEW = (
    "Its interval includes 1, the ratio of a network that never saw the examples: the figure cannot tell. "
    "Take up more requests, or train more references"
)


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
                f"{check.name} was not measured on so few examples. Take up more requests together, or pass "
                "--accept-unmeasured, which is recorded"
            )
        else:
            few = check.name == "relearn_ratio" and check.low is not None and check.low <= 1
            lines.append(f"{check.name}: {failure(check)}. {TOO_FEW if few else HELP[check.name]}")
    if not escalated:
        lines.append("--escalate tries the settings of the job file in order, retraining last")
    return lines
