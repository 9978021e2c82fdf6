"""The checks of a run as rows of a table, with what each figure shows: for ``ledger run`` and for the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from delfast.ledger.results import Check
from delfast.ledger.words import THRESHOLDS, Threshold, amount, is_unsure, set_name, signed

HELD, UNSURE, BLIND = "held", "held, undecided", "held, shows nothing"
UNMEASURED, FAILED, NO_MASK = "not measured", "did not hold", "does not apply"
RESULTS = {
    HELD: "",
    UNSURE: "the interval includes the limit",
    BLIND: "the model before the run was within the limit too, so nothing is seen of forgetting",
    NO_MASK: "the run had no mask, so every element could change",
    UNMEASURED: "",
    FAILED: "",
}
"""Each result and what it means where its words alone do not say it, in the order in which results are counted."""
COLUMNS = ["check", "figure", "95 % interval", "limit", "before the run", "result"]
TOLD = "By --accept-unmeasured it does not count against the run."
NOT_MEASURED = {
    "earlier_attack_advantage": "It does not count against the run: each run before was accepted without it."
}
ATTACKS, ATTACK_LEVEL = ("attack_advantage", "earlier_attack_advantage"), "90 %"
"""Checks whose nominal 95 % interval holds the true figure about 18 times of 20."""
LARGE = 100  # of a ratio: decimals say nothing


def result_of(check: Check, *, has_mask: bool) -> str:
    """Return what the figure of a check shows; ``has_mask``: the attempt was kept to a mask."""
    if check.name == "outside_mask" and not has_mask:
        return NO_MASK
    if check.value is None and check.name != "method":
        return UNMEASURED
    if not check.held:
        return FAILED
    if check.held_before:
        return BLIND
    return UNSURE if is_unsure(check) else HELD


def title_of(check: Check) -> str:
    """Return the title of a check, with the run whose forget set was measured if it is an earlier one."""
    if check.name == "method":
        return "The method"
    title = THRESHOLDS[check.name].title
    return f"{title} ({check.set})" if check.set.startswith("run ") else title


def row_of(check: Check, *, has_mask: bool) -> list[str]:
    """Return a row of the table with ``COLUMNS``."""
    found = result_of(check, has_mask=has_mask)
    if check.name == "method":
        return [title_of(check), "failed", "", "", "", found]
    if found == NO_MASK:
        return [title_of(check), "", "", "", "", found]
    threshold = THRESHOLDS[check.name]
    figure, limit, before = (
        "" if each is None else amount(each, threshold) for each in (check.value, check.limit, check.before)
    )
    return [title_of(check), figure, interval_of(check), limit, before, found]


def interval_of(check: Check) -> str:
    """Return the interval of a check's figure, its ends in ascending order; empty without one."""
    if check.low is None or check.high is None:
        return ""
    if check.low == check.high:
        return "none: all alike"
    threshold = THRESHOLDS[check.name]
    low, high = sorted((check.low, check.high), key=lambda end: threshold.sign * end)
    level = f" ({ATTACK_LEVEL})" if check.name in ATTACKS else ""
    return f"{_end(low, threshold)} to {_end(high, threshold)}{level}"


def _end(value: float, threshold: Threshold) -> str:
    return f"{value:.1e}" if value >= LARGE * 100 else f"{value:.0f}" if value >= LARGE else signed(value, threshold)


def sentence_of(check: Check, *, has_mask: bool, has_accuracy: bool) -> str:
    """Return what a check measured, in words; ``has_accuracy``: the job has no loss of its own."""
    if check.name == "method":
        return f"The method failed: {check.set}."
    threshold = THRESHOLDS[check.name]
    if result_of(check, has_mask=has_mask) == NO_MASK:
        return f"{threshold.title}: {NO_MASK}, since {RESULTS[NO_MASK]}."
    if check.value is None:
        why = f": {check.reason}" if check.reason else ""
        return f"{threshold.title}: not measured{why}." + (
            f" {NOT_MEASURED.get(check.name, TOLD)}" if check.held else ""
        )
    sentence, value = threshold.sentence, check.value
    if value < 0 and threshold.if_below_0:
        sentence, value = threshold.if_below_0, -value
    if not has_accuracy and threshold.of_losses:
        sentence = threshold.of_losses
    size = f"{value:.{threshold.digits}f}" + (f" {threshold.unit}" if threshold.unit else "")
    text = sentence.format(value=size, set=set_name(check.set))
    if threshold.compared:
        text += f" The limit is{threshold.compared}."
    return f"{text} {check.reason}." if check.reason else text


def figure_results(checks: Iterable[Check], *, has_mask: bool) -> list[str]:
    """Return the results of the checks that are figures of forgetting or of its cost.

    A comparison of bits that held is left out, since it shows nothing about either.
    """
    shown = (check for check in checks if not (check.name == "outside_mask" and check.held))
    return [result_of(check, has_mask=has_mask) for check in shown]


def counted_results(results: Iterable[str]) -> list[str]:
    """Return how often each result occurs, in words, in the order of ``RESULTS``."""
    found = list(results)
    return [f"{found.count(each)} {each}" for each in RESULTS if each in found]


def table_lines(checks: Sequence[Check], *, has_mask: bool) -> list[str]:
    """Return the checks as a table for a terminal, with columns of equal width, then what its results mean."""
    rows = [COLUMNS, *(row_of(check, has_mask=has_mask) for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    found = {row[-1] for row in rows}
    reasons = [f"{title_of(check)}: {check.reason or check.set}" for check in checks if check.value is None]
    return [*lines, *(f"{each}: {why}" for each, why in RESULTS.items() if why and each in found), *reasons]
