"""Plain words for the figures, thresholds and limits of a ledger's report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from delfast.ledger.checks import MIN_EXAMPLES
from delfast.ledger.events import ACCEPTED, REJECTED
from delfast.ledger.evidence import RESULTS
from delfast.ledger.report.history import TakenRequest
from delfast.ledger.requests import PENDING, RUNNING
from delfast.ledger.words import THRESHOLDS

SMALL = 30  # examples below which most intervals are too wide to separate forgotten from remembered
REQUEST_STATUS = {
    ACCEPTED: "carried out",
    REJECTED: "open, last run did not pass",
    RUNNING: "open, run without a result",
    PENDING: "open, no run yet",
}
RUN_STATUS = {ACCEPTED: "passed", REJECTED: "did not pass", RUNNING: "no result yet"}
EVIDENCE = (
    "This report is evidence, not a certificate. Each figure is a measurement with its uncertainty, made by the tests "
    "that are described here. Another test may find more. Nothing here proves that the examples left no trace."
)
LIMITS = (
    "A method that changes a model approximates retraining. It gives no guarantee that an example has no influence "
    "left. A network that was trained from nothing without the examples has none by its training, as far as the job "
    "file and the training data are what they are said to be.",
    "An attack that fails is no proof: a stronger one, or one that compares the models before and after, may succeed.",
    "Intervals are wide where a forget set is small.",
    "The audit measures this model only. Copies of it, its outputs, the training data and backups are not checked.",
    "The chain of hashes shows that entries were not edited after the head was printed. It does not show that the "
    "entries were true when they were written.",
)
DIFFERENT = (
    "Two runs can give different figures for the same model and examples: each run draws other random parts for the "
    "attack, and other examples for relearning. A difference within the intervals is no change of the model."
)
CHOSEN = (
    "More than one attempt was made. The figures of an attempt that is kept because it passed look better, on average, "
    "than its model is."
)
DEFINITIONS = (
    (
        "Carried out, open",
        "The ledger, its commands and its files have other words for this. Carried out: accepted. Open, last run did "
        "not pass: rejected. Open, run without a result: running. Open, no run yet: pending.",
    ),
    (
        "Run, passed",
        "A run makes the model forget the examples of requests, and measures the result. It passed if every limit held "
        "that the job file sets (accept). Its model is then in use. Otherwise the model before it stays in use.",
    ),
    ("Held", "The figure is within its limit. Only a figure that was outside before the run shows forgetting."),
    (
        "Forgetting",
        "The verdict is on all examples of a run together. Seen: a figure was above its limit before the run, whatever "
        "its interval, and is below it with its whole interval after the run. Undecided: the interval includes the "
        "limit. Nothing to see before the run: no figure was above its limit before. Not measured: there is no figure "
        "of forgetting. Trained without them: a new network was trained from nothing without the examples.",
    ),
    *(
        (result[0].upper() + result[1:], meaning[0].upper() + meaning[1:] + ".")
        for result, meaning in RESULTS.items()
        if meaning
    ),
    ("Forget set", "The examples that a run was to forget: those of all its requests."),
    (
        "Retain set",
        "The training set without the examples of every request that was carried out or open when the run began.",
    ),
    ("Never-seen examples", "Examples that were not trained on, as a control: the test set."),
    (
        "Method",
        "How a run makes the model forget. del: the elements that matter most for the forget set are reset and "
        "trained again on the retain set. retrain: a new network is trained from nothing on the retain set. The guide "
        "of delfast has the others.",
    ),
    ("Element", "One number of the model. Training and unlearning change these numbers."),
    (
        "Mask",
        "The elements that a run may change, chosen by the examples to forget; the budget is their share of all. The "
        "model's last layer may change too.",
    ),
    (
        "Reference model",
        "A network of the same kind that was trained on a random half of the examples, to compare with.",
    ),
    ("Accuracy", "Percent of examples whose class is predicted. A network that never saw the examples is not at 0 %."),
    (
        "Loss",
        "Mean error of the model's predictions, as its training measures it: lower is surer and more often right.",
    ),
    *((threshold.title, threshold.meaning) for threshold in THRESHOLDS.values()),
    (
        "LiRA",
        "An attack on each example that compares the model with reference models that never saw the example (Carlini "
        "et al. 2022, arXiv 2112.03570). AUC: how well it ranks forgotten above never-seen examples. 0.5 is guessing, "
        "1 is always right. Below 0.5 the model is less sure of the forgotten examples than networks that never saw "
        "them: they are not remembered, but far below 0.5 an attacker who expects that can tell that they were "
        "unlearned. TPR at 1 %: percent of the forgotten examples that the attack finds while it wrongly names 1 % of "
        "the never-seen ones. No limit applies to LiRA.",
    ),
    (
        "Interval",
        "Ranges in brackets, and those called 95 % interval, hold the true figure about 19 times of 20. Those of the "
        "attack, marked 90 %, do so about 18 times.",
    ),
    (
        "SHA-256, digest, head",
        "A SHA-256 or digest is a number computed from a file; a changed file has another one. The head is that of the "
        "ledger's newest entry, and stands for all entries before it.",
    ),
)
SETTINGS = {"lr": "learning rate", "weight_decay": "weight decay", "batch_size": "batch size"}


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
    if forget["count"] < MIN_EXAMPLES:
        return ["The forget set has 1 example. The attack and the relearning ratio need at least 2: not measured."]
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
        found.append("No reference models: the attack on each example (LiRA) was not made.")
    elif lira["left_out"]:
        left_out = counted(lira["left_out"], "example")
        found.append(
            f"The attack on each example (LiRA) leaves out {left_out}, which fewer than two reference models had never "
            "seen."
        )
    if figures["relearn_ratio"] is None:
        found.append("Relearning was not compared with networks that never saw the examples.")
    found += [
        f"Relearning on {name} was not measured: {curves['left_out']}."
        for name, curves in figures["relearning"].items()
        if "left_out" in curves
    ]
    return found


def settings(values: Mapping[str, Any]) -> str:
    """Settings in words, the method first."""
    names = sorted(values, key=lambda name: (name != "method", name))
    return ", ".join(f"{SETTINGS.get(name, name)} {values[name]}" for name in names)


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


def runs(numbers: list[int]) -> str:
    """The word and the numbers of runs, to begin a sentence."""
    return f"Run{'' if len(numbers) == 1 else 's'} {listed(numbers)}"


def date(time: str) -> str:
    """A time of an entry, to the minute, in UTC."""
    return f"{time[:10]} {time[11:16]}"


def is_overdue(request: TakenRequest, today: datetime.date) -> bool:
    """Whether a request's due date has passed before it was carried out."""
    return request.status != ACCEPTED and request.due is not None and request.due < today.isoformat()


def due(request: TakenRequest, today: datetime.date) -> str:
    """A request's due date, marked if it has passed or was missed; empty without one."""
    if request.due is None:
        return ""
    if request.status == ACCEPTED:
        return request.due + (", carried out later" if request.runs[-1].decided[:10] > request.due else "")
    return request.due + (", overdue" if is_overdue(request, today) else "")
