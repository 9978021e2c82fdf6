"""The thresholds in plain words, and a check that did not hold in a few words."""

from __future__ import annotations

from dataclasses import dataclass

from delfast.ledger.results import Check


@dataclass(frozen=True)
class Threshold:
    """A threshold of the job: its title, the unit and decimals of its figure, what it means, and a sentence for it."""

    title: str
    unit: str
    digits: int
    meaning: str
    sentence: str
    if_below_0: str = ""
    """The sentence for a figure below 0, with its size, where figures can be below 0."""
    of_losses: str = ""
    """The sentence for a job with its own loss, where it differs."""
    sign: int = 1
    """-1 for a loss, which is shown as a change: a loss of 2 points as -2."""
    compared: str = ""
    """The words that name what is compared with the limit, where that is not the figure itself."""


THRESHOLDS = {
    "outside_mask": Threshold(
        "Changes outside the mask and the last layer",
        "",
        0,
        "Number of the model's elements outside the mask and the last layer that differ, bit by bit, from those before "
        "the run.",
        "{value} elements outside the mask and the last layer changed. This shows what the run left alone. It shows "
        "nothing about forgetting.",
    ),
    "test_drop": Threshold(
        "Change of test accuracy",
        "points",
        2,
        "Percentage points between the accuracy on the test set and that of the ledger's first model: the cost of "
        "unlearning, over all runs so far. In the job file the limit is test_drop, a fall.",
        "Accuracy on the test set is {value} below that of the ledger's first model.",
        if_below_0="Accuracy on the test set is {value} above that of the ledger's first model.",
        sign=-1,
    ),
    "attack_advantage": Threshold(
        "Attack advantage",
        "",
        3,
        "2 · (balanced accuracy - 0.5) of an attacker that sees the model's confidence and separates a forget set from "
        "never-seen examples: 0 is guessing, 1 is always right.",
        "An attacker who sees how sure the model is of each example separated {set} from never-seen examples with an "
        "advantage of {value}, where 0 is guessing and 1 is always right.",
    ),
    "earlier_attack_advantage": Threshold(
        "Attack advantage, earlier sets",
        "",
        3,
        "The attack's largest advantage of the forget sets of all accepted runs before. A run is rejected if the lower "
        "end of the interval is above the limit: the largest of many figures is above any limit by chance.",
        "Of the forget sets of earlier runs, the attacker separated {set} best from never-seen examples, with an "
        "advantage of {value}, where 0 is guessing and 1 is always right.",
        compared=" for the lower end of the interval",
    ),
    "relearn_ratio": Threshold(
        "Relearning ratio",
        "",
        2,
        "A copy of the model is trained a little further, and so are networks that never saw the forget set. The ratio "
        "is that of their odds of a right answer on the forget set; for a job with its own loss, that of the mean "
        "losses, the other way round. About 1: gone, as far as this test shows. Far above 1: hidden, not gone.",
        "A copy of the model was trained a little further, to see whether what it learned from {set} comes back. Its "
        "odds of a right answer there were {value} times those of networks that never saw these examples. About 1: "
        "like never seen. Far above 1: hidden, not gone.",
        of_losses="A copy of the model was trained a little further, to see whether what it learned from {set} comes "
        "back. Networks that never saw these examples had {value} times its mean loss there. About 1: like never seen. "
        "Far above 1: hidden, not gone.",
    ),
}


def amount(value: float | None, threshold: Threshold) -> str:
    """A threshold's figure with its unit; a loss as a change."""
    if value is None:
        return "not measured"
    text = signed(value, threshold)
    return f"{text} {threshold.unit}" if threshold.unit else text


def signed(value: float, threshold: Threshold) -> str:
    """A threshold's figure without its unit; a loss as a change with its sign."""
    shown = 0.0 + round(threshold.sign * value, threshold.digits)  # no -0.00
    return f"{shown:{'+' if threshold.sign < 0 and shown else ''}.{threshold.digits}f}"


def set_name(name: str) -> str:
    """A set in words: the forget set of the run itself, or of an earlier run."""
    return "the forget set" if name == "forget" else f"the forget set of {name}"


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
