"""The thresholds under which a ledger accepts an unlearned model, and advice where one does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delfast.errors import InputError
from delfast.ledger.results import Check
from delfast.ledger.words import failure

if TYPE_CHECKING:  # imports torch
    from delfast.jobs import Accept

MIN_REFERENCES = 2  # the variance of LiRA's Gaussians, and an interval of the relearning ratio, need two
MIN_EXAMPLES = 2  # of a forget set, for the attack and the ratio
MAX_LEFT_OUT = 0.1  # of a forget set: an advantage on a part of it does not hold for the rest
Measured = tuple[Mapping[str, Any] | None, str]  # a figure, or why there is none


def refuse_unmeasurable(accept: Accept, has_accuracy: bool, references: int, options: str) -> None:
    """Raise InputError for a threshold that this job or ledger cannot measure.

    ``options``: those of a command that names the ledger and its job.
    """
    if accept.test_drop is not None and not has_accuracy:
        raise InputError(
            "expected accuracies for the threshold test_drop, a job with a loss_fn has none; "
            "define accept in the job file without test_drop"
        )
    if accept.relearn_ratio is not None and references < MIN_REFERENCES:
        raise InputError(
            f"expected at least {MIN_REFERENCES} reference models for relearn_ratio, the ledger has "
            f"{references}; train them: delfast ledger references {options} --count 8, "
            "or define accept in the job file without relearn_ratio"
        )


def refuse_unmeasured(accept: Accept, figures: Mapping[str, Any]) -> None:
    """Raise InputError for a threshold that the audit of the model before the run could not measure."""
    for name, (value, why) in (("attack_advantage", advantage(figures, "forget")), ("relearn_ratio", _ratio(figures))):
        if getattr(accept, name) is not None and value is None:
            raise InputError(
                f"expected a forget set on which the threshold {name} can be measured, but {why}; take up more "
                "requests together, or pass --accept-unmeasured, which is recorded"
            )


def check_all(
    accept: Mapping[str, float | None],
    first_test_accuracy: float | None,
    verified: Mapping[str, Any],
    figures: Mapping[str, Any],
    baseline: Mapping[str, Any],
    *,
    accept_unmeasured: bool = False,
) -> list[Check]:
    """Return a check of the comparison with the mask, and of each threshold that is set.

    ``figures``: of the audit of the result; ``baseline``: of that of the model before the run. The test accuracy is
    compared with that of the ledger's first model, so that small losses cannot add up unnoticed. A figure that could
    not be measured holds with ``accept_unmeasured`` alone. The attack has a check for the new forget set, and one for
    the worst of the earlier sets if there are any.
    """
    found = [Check("outside_mask", verified["outside"], 0, verified["outside"] == 0, "model")]
    if accept["test_drop"] is not None:
        drop, before = (_drop(first_test_accuracy, each) for each in (figures, baseline))
        found.append(_check("test_drop", drop, before, accept["test_drop"], "test", accept_unmeasured))
    if (limit := accept["attack_advantage"]) is not None:
        new, before = (advantage(each, "forget") for each in (figures, baseline))
        found.append(_check("attack_advantage", new, before, limit, "forget", accept_unmeasured))
        earlier = {name: advantage(figures, name) for name in figures["sets"] if name.startswith("run ")}
        if earlier:
            found.append(_check_earlier(earlier, baseline, limit))
    if accept["relearn_ratio"] is not None:
        ratio, before = _ratio(figures), _ratio(baseline)
        found.append(_check("relearn_ratio", ratio, before, accept["relearn_ratio"], "forget", accept_unmeasured))
    return found


def _check(name: str, after: Measured, before: Measured, limit: float, where: str, accept_unmeasured: bool) -> Check:
    (figure, why), (earlier, _) = after, before
    value_before = None if earlier is None else earlier["value"]
    if figure is None:
        return Check(name, None, limit, accept_unmeasured, where, before=value_before, reason=why)
    held = figure["value"] <= limit
    return Check(name, figure["value"], limit, held, where, figure["low"], figure["high"], value_before)


def _check_earlier(earlier: Mapping[str, Measured], baseline: Mapping[str, Any], limit: float) -> Check:
    """Return the check of the worst earlier set, which rejects where the lower end of its interval is above the limit.

    The largest of many figures of a few examples passes any limit by chance, also for a network that never saw the
    examples, and no method can change that. The worst set is the largest of those that reject, or else of all. Sets
    that cannot be measured are counted and do not reject: they were accepted as they were.
    """
    measured = {name: figure for name, (figure, _) in earlier.items() if figure is not None}
    missing = len(earlier) - len(measured)
    reason = f"{missing} of {len(earlier)} earlier sets cannot be measured" if missing else None
    name = "earlier_attack_advantage"
    if not measured:
        return Check(name, None, limit, True, next(iter(earlier)), reason=reason)
    failing = {each: figure for each, figure in measured.items() if figure["low"] > limit}
    chosen = failing or measured
    worst = max(chosen, key=lambda each: float(chosen[each]["value"]))
    figure, (before, _) = chosen[worst], advantage(baseline, worst)
    value_before = None if before is None else before["value"]
    return Check(
        name, figure["value"], limit, not failing, worst, figure["low"], figure["high"], value_before, reason=reason
    )


def _drop(first: float | None, figures: Mapping[str, Any]) -> Measured:
    """Return the loss of accuracy (percentage points), with the interval of the accuracy after."""
    after = figures["sets"]["test"]["accuracy"]
    if first is None or after is None:
        return None, "a job with a loss_fn has no accuracies"
    ends = {"value": after["value"], "low": after["high"], "high": after["low"]}
    return {name: None if end is None else first - end for name, end in ends.items()}, ""


def advantage(figures: Mapping[str, Any], name: str) -> Measured:
    """Return the attack's advantage on a set; none if it leaves out more than a tenth of the set."""
    found = figures["sets"].get(name)
    if found is None:
        return None, "it is a set of a later run"
    if found["attack_left_out"] > MAX_LEFT_OUT * found["count"]:
        left_out = f"{found['attack_left_out']} of {found['count']} examples"
        return None, f"the test set has no example of the labels of {left_out}"
    return found["attack_advantage"], _too_few(found["count"])


def _ratio(figures: Mapping[str, Any]) -> Measured:
    """Return the relearning ratio, and the audit's reasons where there is none."""
    if (count := figures["sets"]["forget"]["count"]) < MIN_EXAMPLES:
        return figures["relearn_ratio"], _too_few(count)
    curves = figures["relearning"].values()
    reasons = dict.fromkeys(each.get("left_out") or each["ratio_left_out"] for each in curves)
    return figures["relearn_ratio"], "; ".join(filter(None, reasons)) or "the ledger has no reference models"


def _too_few(count: int) -> str:
    """Return why a figure of a forget set of this size is not measured."""
    return f"it needs at least {MIN_EXAMPLES} examples, the forget set has {count}"


HELP = {
    "outside_mask": "The job's load or save alters weights, or delfast has a fault",
    "test_drop": "The model lost test accuracy. Try a smaller budget, more epochs, or retraining",
    "attack_advantage": "The examples still stand out. Try a larger budget, more epochs, another method, or retraining",
    "earlier_attack_advantage": (
        "The examples of an earlier run stand out. A larger budget for the new ones does not change that. Try "
        "retraining, which leaves out all of them"
    ),
    "relearn_ratio": "The examples are hidden, not gone. Try a larger budget, another method, or retraining",
}
RETRAINED = (  # a network that never saw the examples has such figures by chance, or as they are easy for any network
    "Retraining was tried, so a larger budget or another method is no help. Take up more requests together, or look "
    "whether the limit fits the job: measure a network that never saw the examples"
)
TOO_FEW = (
    "Its interval includes 1, the ratio of a network that never saw the examples: the ratio may be chance. "
    "Take up more requests, or train more reference models"
)


def advice(checks: Sequence[Check], attempts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each check of the last attempt that does not hold: what failed and what would help.

    ``attempts``: the settings of every attempt.
    """
    methods = [each["method"] for each in attempts]
    lines = []
    for check in checks:
        if check.held:
            continue
        if check.name == "method":
            lines.append(f"{methods[-1]} failed: {check.set}")
        elif check.value is None:
            lines.append(
                f"{check.name} was not measured: {check.reason}. Take up more requests together, or pass "
                "--accept-unmeasured, which is recorded"
            )
        else:
            few = check.name == "relearn_ratio" and check.low is not None and check.low <= 1
            helps = RETRAINED if "retrain" in methods and check.name != "outside_mask" else HELP[check.name]
            lines.append(f"{check.name}: {failure(check)}. {TOO_FEW if few else helps}")
    if len(methods) == 1 and methods[0] != "retrain":  # which comes last
        lines.append("--escalate tries the settings of the job file in order, retraining last")
    return lines
