"""The checks of a run in plain words, as ``ledger run`` prints them and the report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delfast.ledger.results import Check


@dataclass(frozen=True)
class Threshold:
    """A threshold of the job: its title, the unit, decimals and best value of its figure, and what the figure means."""

    title: str
    unit: str
    digits: int
    meaning: str
    sentence: str
    if_below_0: str = ""
    """The sentence for a figure below 0, with its size, where figures can be below 0."""
    best: float = 0.0


THRESHOLDS = {
    "outside_mask": Threshold(
        "Changes outside the mask",
        "",
        0,
        "Number of the model's elements outside the mask that differ, bit by bit, from those before the run.",
        "{value} elements outside the mask changed.",
    ),
    "test_drop": Threshold(
        "Fall of test accuracy",
        "points",
        2,
        "Percentage points by which accuracy on the test set is lower than that of the ledger's first model: the cost "
        "of unlearning, over all runs so far.",
        "Accuracy on the test set is {value} below that of the ledger's first model.",
        if_below_0="Accuracy on the test set is {value} above that of the ledger's first model.",
    ),
    "attack_advantage": Threshold(
        "Attack advantage",
        "",
        3,
        "2 · (balanced accuracy - 0.5) of an attacker that sees the model's confidence and separates a forget set from "
        "never-seen examples: 0 is guessing, 1 is always right. The limit is for the largest of all forget sets so "
        "far.",
        "An attacker that sees the model's confidence separated {set} from never-seen examples with an advantage of "
        "{value} (0: guessing, 1: always right).",
    ),
    "relearn_ratio": Threshold(
        "Relearning ratio",
        "",
        2,
        "Odds that the model answers a forgotten example correctly while it is finetuned for a short time, over the "
        "odds of networks that never saw the example. About 1: gone, as far as this test shows. Far above 1: hidden, "
        "not gone.",
        "Finetuned for a short time, the model's odds of answering a forgotten example correctly were {value} times "
        "the odds of networks that never saw it (about 1: like never seen; far above 1: hidden, not gone).",
        best=1.0,
    ),
}


def number(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals; "not measured" for None."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def amount(value: float | None, threshold: Threshold) -> str:
    """A threshold's figure with its unit."""
    return number(value, threshold.digits) + (f" {threshold.unit}" if threshold.unit and value is not None else "")


def set_name(name: str) -> str:
    """A set in words: the forget set of the run itself, or of an earlier run."""
    return "the forget set" if name == "forget" else f"the forget set of {name}"


def check_sentence(check: Check) -> str:
    """The result of a check, in words, with the interval of its figure if there is one."""
    if check.name == "method":
        return f"The method failed: {check.set}."
    threshold = THRESHOLDS[check.name]
    verdict = "held" if check.held else "did not hold"
    limit = f"Limit {amount(check.limit, threshold)}: {verdict}."
    if check.value is None:
        why = f": {check.reason}" if check.reason else ""
        told = "The run accepts this by --accept-unmeasured." if check.held else limit
        return f"{threshold.title}: not measured{why}. {told}"
    sentence, value = threshold.sentence, check.value
    if value < 0 and threshold.if_below_0:
        sentence, value = threshold.if_below_0, -value
    text = f"{sentence.format(value=amount(value, threshold), set=set_name(check.set))} {limit}"
    if check.low is not None and check.high is not None:
        text += _interval(check, threshold)
    if check.before is not None:
        text += f" Before the run: {amount(check.before, threshold)}."
    return f"{text} {NOTHING_SHOWN}" if check.held_before else text


NOTHING_SHOWN = "The model before the run held it too: this figure does not show that anything was forgotten."


def _interval(check: Check, threshold: Threshold) -> str:
    if check.low == check.high:
        return " No interval: all examples had the same figure."
    ends = f"{check.low:.{threshold.digits}f} to {check.high:.{threshold.digits}f}"
    return f" 95 % interval {ends}" + (", which reaches above the limit." if is_unsure(check) else ".")


def verdict(checks: Sequence[Check]) -> str:
    """In a few words, that the checks of accepted runs held, and how many figures were not measured."""
    unmeasured = sum(check.value is None for check in checks)
    if not unmeasured:
        return "all thresholds held"
    return f"all thresholds held that were measured; {unmeasured} of {len(checks)} figures were not"


def is_unsure(check: Check) -> bool:
    """Return whether a figure held its limit and its interval reaches above the limit."""
    return check.held and check.limit is not None and check.high is not None and check.high > check.limit


def failure(check: Check) -> str:
    """Name a check that did not hold, its figure and its limit, in a few words."""
    if check.name == "method":
        return f"the method failed ({check.set})"
    threshold = THRESHOLDS[check.name]
    where = f" on {set_name(check.set)}" if check.set.startswith("run ") else ""
    value, limit = (amount(each, threshold) for each in (check.value, check.limit))
    return f"{threshold.title.lower()} {value}{where}, limit {limit}"
