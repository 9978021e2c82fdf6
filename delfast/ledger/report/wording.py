"""Plain words for the figures, thresholds and limits of a ledger's report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Threshold:
    """A threshold of the job: its title, the unit, decimals and best value of its figure, and what the figure means."""

    title: str
    unit: str
    digits: int
    meaning: str
    sentence: str
    best: float = 0.0


THRESHOLDS = {
    "outside_mask": Threshold(
        "Changes outside the mask",
        "",
        0,
        "Number of the model's parameters outside the mask that differ, bit by bit, from those before the run.",
        "{value} parameters outside the mask changed.",
    ),
    "test_drop": Threshold(
        "Fall of test accuracy",
        "points",
        2,
        "Percentage points by which accuracy on the test set is lower than that of the ledger's first model: the cost "
        "of unlearning, of all requests so far.",
        "Accuracy on the test set, that of the ledger's first model minus that after the run: {value}.",
    ),
    "attack_advantage": Threshold(
        "Attack advantage",
        "",
        3,
        "2 · (balanced accuracy - 0.5) of an attacker that sees the model's confidence and separates the forget set "
        "from never-seen examples: 0 is guessing, 1 is always right.",
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
FAILED = "method"  # the name of a check that a method failed; its set is the error
SMALL = 30  # examples below which most intervals are too wide to separate forgotten from remembered
EVIDENCE = (
    "This report is evidence, not a certificate. Each figure is a measurement with its uncertainty, made by the tests "
    "that are described here. Another test may find more. Nothing here proves that the examples left no trace."
)
LIMITS = (
    "The method is an approximation of retraining. It gives no guarantee that an example has no influence left.",
    "An attack that fails is no proof: a stronger one, or one that compares the models before and after, may succeed.",
    "Intervals are wide where a forget set is small.",
    "The audit measures this model only. Copies of it, its outputs, the training data and backups are not checked.",
    "The chain of hashes shows that entries were not edited after the head was printed. It does not show that the "
    "entries were true when they were written.",
)
DEFINITIONS = (
    ("Forget set", "The examples that a run was to forget: those of all its requests."),
    ("Retain set", "The training set without all examples of accepted requests and of the run's own."),
    (
        "Never-seen examples",
        "Examples that were not trained on, as a control: the test set, unless the ledger names others.",
    ),
    ("Accuracy", "Percent of examples whose class is predicted. A network that never saw the examples is not at 0 %."),
    *((threshold.title, threshold.meaning) for threshold in THRESHOLDS.values()),
    (
        "LiRA",
        "A per-example attack that compares the model with reference models that never saw the example (Carlini et al. "
        "2022, arXiv 2112.03570). AUC: area under its ROC curve, 0.5 is guessing. TPR at 1 %: percent of the "
        "forgotten examples that it finds while it wrongly names 1 % of the never-seen ones.",
    ),
    (
        "KL",
        "Divergence, in nats, of the model's predictions from those of a network that was retrained without the set.",
    ),
    ("Interval", "Every range in brackets is a 95 % interval of the measurement."),
)


def number(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals; "not measured" for None."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def interval(figure: Mapping[str, float | None] | None, digits: int) -> str:
    """A figure with its 95 % interval; empty for None."""
    if figure is None:
        return ""
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.{digits}f} [no interval]"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def amount(value: float | None, threshold: Threshold) -> str:
    """A threshold's figure with its unit."""
    return number(value, threshold.digits) + (f" {threshold.unit}" if threshold.unit and value is not None else "")


def verdict(check: Mapping[str, Any]) -> str:
    """ "held" or "did not hold"; "not asked for" without a limit."""
    if check["limit"] is None:
        return "not asked for"
    return "held" if check["held"] else "did not hold"


def threshold_of(check: Mapping[str, Any]) -> Threshold:
    """The threshold of a check, or a plain one for a name that this report does not know."""
    name = check["name"]
    return THRESHOLDS.get(name, Threshold(name, "", 3, "", f"{name}: {{value}}."))


def check_sentence(check: Mapping[str, Any]) -> str:
    """The result of one comparison with a threshold, in words, with the interval of its figure if there is one."""
    if check["name"] == FAILED:
        return f"The method failed: {check['set']}."
    threshold = threshold_of(check)
    if check["value"] is None:
        return f"{threshold.title}: not measured; {verdict(check)}."
    where = "the forget set" if check["set"] in ("forget", None) else f"the forget set of {check['set']}"
    text = threshold.sentence.format(value=amount(check["value"], threshold), set=where)
    if check["limit"] is None:
        return f"{text} No limit was asked for."
    text = f"{text} Limit {amount(check['limit'], threshold)}: {verdict(check)}."
    if check.get("low") is None or check.get("high") is None:
        return text
    ends = f"{check['low']:.{threshold.digits}f} to {check['high']:.{threshold.digits}f}"
    return f"{text} 95 % interval {ends}" + (", which reaches above the limit." if is_unsure(check) else ".")


def failure(check: Mapping[str, Any]) -> str:
    """A few words on a check that did not hold."""
    if check["name"] == FAILED:
        return f"the method failed ({check['set']})"
    threshold = threshold_of(check)
    value = amount(check["value"], threshold)
    return f"{threshold.title.lower()} {value}" + (
        "" if check["limit"] is None else f", limit {amount(check['limit'], threshold)}"
    )


def is_unsure(check: Mapping[str, Any]) -> bool:
    """Return whether a figure held its limit and its interval reaches above the limit."""
    high = check.get("high")
    return bool(check["held"]) and check["limit"] is not None and high is not None and high > check["limit"]


def missing(figures: Mapping[str, Any]) -> list[str]:
    """Sentences on what an audit could not measure, or measured on few examples."""
    forget = figures["sets"]["forget"]
    found = []
    if forget["count"] < SMALL:
        found.append(
            f"The forget set has {counted(forget['count'], 'example')}: most intervals are too wide to separate "
            "forgotten from remembered."
        )
    if forget.get("attack_advantage") is None:
        found.append("The attack was not measured: too few examples, or none of the same labels that were never seen.")
    elif forget.get("attack_left_out"):
        left_out = counted(forget["attack_left_out"], "example")
        found.append(f"The attack leaves out {left_out}, of labels that no never-seen example has.")
    lira = forget.get("lira")
    if lira is None:
        found.append("No reference models: the per-example attack (LiRA) was not made.")
    elif lira["left_out"]:
        left_out = counted(lira["left_out"], "example")
        found.append(f"LiRA leaves out {left_out}, which fewer than two reference models had never seen.")
    if forget.get("kl") is None:
        found.append("No network was retrained without the forget set to compare with (KL).")
    if figures["relearn_ratio"] is None:
        found.append("Relearning was not compared with networks that never saw the examples.")
    found += [
        f"Relearning on {name} was not measured: {curves['left_out']}."
        for name, curves in figures["relearning"].items()
        if "left_out" in curves
    ]
    return found


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless it is one."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(numbers: tuple[int, ...] | list[int]) -> str:
    """Numbers as text, runs of consecutive ones as a range: "1 to 3, 7"."""
    parts: list[list[int]] = []
    for each in sorted(numbers):
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts)


def requests(numbers: tuple[int, ...] | list[int]) -> str:
    """The word and the numbers of requests."""
    return f"request{'' if len(numbers) == 1 else 's'} {listed(numbers)}"


def date(time: str) -> str:
    """A time of an entry, to the minute, in UTC."""
    return f"{time[:10]} {time[11:16]}"
