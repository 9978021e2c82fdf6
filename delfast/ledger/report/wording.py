"""Plain words for the figures, thresholds and limits of a ledger's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delfast.ledger.words import THRESHOLDS

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
    (
        "Retain set",
        "The training set without the examples of every request that was accepted or open when the run began.",
    ),
    (
        "Never-seen examples",
        "Examples that were not trained on, as a control: the test set, unless the ledger names others.",
    ),
    (
        "Mask",
        "The elements that a run may change, chosen on the examples to forget. The head, the model's last layer, may "
        "change too.",
    ),
    (
        "Reference model",
        "A network of the same kind that was trained on a random half of the examples, to compare with.",
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
        "Divergence, in nats, of the model's predictions from the oracle's, a network retrained without the set.",
    ),
    ("Interval", "Every range in brackets is a 95 % interval of the measurement."),
)


def interval(figure: Mapping[str, float | None] | None, digits: int) -> str:
    """A figure with its 95 % interval; empty for None. A range of one value is none: its examples do not differ."""
    if figure is None:
        return ""
    if figure["low"] is None or figure["high"] is None or figure["low"] == figure["high"]:
        return f"{figure['value']:.{digits}f} [no interval]"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


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
        found.append("There is no oracle, a network retrained without the forget set, to compare with (KL).")
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
