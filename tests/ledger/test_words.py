"""Checks in words: signs, units, sets, intervals, results, and what was not measured."""

from __future__ import annotations

import pytest

from delfast.ledger import Check
from delfast.ledger.evidence import (
    BLIND,
    FAILED,
    HELD,
    NO_MASK,
    UNMEASURED,
    UNSURE,
    counted_results,
    figure_results,
    result_of,
    row_of,
    sentence_of,
    table_lines,
)
from delfast.ledger.words import THRESHOLDS, amount, failure

OUTSIDE = Check("outside_mask", 0, 0, True, "model")
LOST = Check("test_drop", 0.5, 2.0, True, "test", -0.4, 1.4, 0.0)
GAINED = Check("test_drop", -7.8, 2.0, True, "test", -10.72, -4.36, -7.2)
UNSURE_LOSS = Check("test_drop", 1.0, 2.0, True, "test", -1.0, 2.5)
EARLIER = Check("earlier_attack_advantage", 0.3, 0.25, True, "run 3", 0.1, 0.5)
ALIKE = Check("relearn_ratio", 1.0, 1.5, True, "forget", 1.0, 1.0)
BEFORE = Check("relearn_ratio", 1.0, 1.5, True, "forget", 0.02, 122.83, 1.1)
WIDE = Check("relearn_ratio", 2.0, 1.5, False, "forget", 0.02, 5e7)
UNMEASURED_RATIO = Check("relearn_ratio", None, 1.5, False, "forget", reason="too few")
TOLD = Check("relearn_ratio", None, 1.5, True, "forget", reason="too few")
NO_EARLIER = Check(
    "earlier_attack_advantage", None, 0.25, True, "run 1", reason="1 of 1 earlier sets cannot be measured"
)
METHOD = Check("method", None, None, False, "the loss is not finite")


@pytest.mark.parametrize(
    ("check", "row"),
    [
        (OUTSIDE, ["Changes outside the mask and the last layer", "0", "", "0", "", HELD]),
        (LOST, ["Change of test accuracy", "-0.50 points", "-1.40 to +0.40", "-2.00 points", "0.00 points", HELD]),
        (GAINED, ["Change of test accuracy", "+7.80 points", "+4.36 to +10.72", "-2.00 points", "+7.20 points", HELD]),
        (UNSURE_LOSS, ["Change of test accuracy", "-1.00 points", "-2.50 to +1.00", "-2.00 points", "", UNSURE]),
        (EARLIER, ["Attack advantage, earlier sets (run 3)", "0.300", "0.100 to 0.500 (90 %)", "0.250", "", UNSURE]),
        (ALIKE, ["Relearning ratio", "1.00", "none: all alike", "1.50", "", HELD]),
        (BEFORE, ["Relearning ratio", "1.00", "0.02 to 123", "1.50", "1.10", BLIND]),
        (WIDE, ["Relearning ratio", "2.00", "0.02 to 5.0e+07", "1.50", "", FAILED]),
        (UNMEASURED_RATIO, ["Relearning ratio", "", "", "1.50", "", UNMEASURED]),
        (TOLD, ["Relearning ratio", "", "", "1.50", "", UNMEASURED]),
        (METHOD, ["The method", "failed", "", "", "", FAILED]),
    ],
)
def test_row(check: Check, row: list[str]) -> None:
    assert row_of(check, has_mask=True) == row


def test_a_run_without_a_mask_has_nothing_outside_it() -> None:
    assert row_of(OUTSIDE, has_mask=False) == ["Changes outside the mask and the last layer", "", "", "", "", NO_MASK]
    assert "the run had no mask" in sentence_of(OUTSIDE, has_mask=False, has_accuracy=True)
    assert result_of(LOST, has_mask=False) == HELD


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (OUTSIDE, "0 elements outside the mask and the last layer changed. This shows what the run left alone."),
        (LOST, "Accuracy on the test set is 0.50 points below that of the ledger's first model."),
        (GAINED, "Accuracy on the test set is 7.80 points above that of the ledger's first model."),
        (EARLIER, "separated the forget set of run 3 best from never-seen examples, with an advantage of 0.300"),
        (EARLIER, "The limit is for the lower end of the interval."),
        (ALIKE, "odds of a right answer there were 1.00 times those of networks that never saw these examples"),
        (UNMEASURED_RATIO, "Relearning ratio: not measured: too few."),
        (TOLD, "Relearning ratio: not measured: too few. By --accept-unmeasured it does not count against the run."),
        (NO_EARLIER, "cannot be measured. It does not count against the run: each run before was accepted without it."),
        (METHOD, "The method failed: the loss is not finite."),
    ],
)
def test_sentence(check: Check, words: str) -> None:
    assert words in sentence_of(check, has_mask=True, has_accuracy=True)


def test_a_job_with_its_own_loss_has_no_right_answers() -> None:
    text = sentence_of(ALIKE, has_mask=True, has_accuracy=False)
    assert "Networks that never saw these examples had 1.00 times its mean loss there." in text and "odds" not in text


def test_a_failure_names_the_set_of_an_earlier_run() -> None:
    assert failure(EARLIER) == "attack advantage, earlier sets 0.300 on the forget set of run 3, limit 0.250"
    assert failure(UNMEASURED_RATIO) == "relearning ratio not measured, limit 1.50"
    assert failure(UNSURE_LOSS) == "change of test accuracy -1.00 points, limit -2.00 points"
    assert failure(METHOD) == "the method failed (the loss is not finite)"


def test_a_table_has_equal_columns_and_what_its_results_mean() -> None:
    lines = table_lines([OUTSIDE, BEFORE, TOLD], has_mask=True)
    head, *rows = lines[:4]
    assert all(row[head.index("result") :].startswith(("held", "not measured")) for row in rows)
    assert max(map(len, lines)) <= 120
    assert lines[4:] == [
        "held, shows nothing: the model before the run was within the limit too, so nothing is seen of forgetting",
        "Relearning ratio: too few",
    ]
    results = [result_of(check, has_mask=True) for check in (OUTSIDE, LOST, BEFORE, TOLD)]
    assert counted_results(results) == ["2 held", "1 held, shows nothing", "1 not measured"]


@pytest.mark.parametrize(
    ("drop", "shown"),
    [(0.001, "0.00"), (-0.001, "0.00"), (0.0, "0.00"), (0.006, "-0.01"), (-0.006, "+0.01"), (2, "-2.00")],
)
def test_a_change_that_rounds_to_0_has_no_sign(drop: float, shown: str) -> None:
    assert amount(drop, THRESHOLDS["test_drop"]) == f"{shown} points"


def test_a_comparison_of_bits_is_no_figure_unless_it_failed() -> None:
    failed = Check("outside_mask", 3, 0, False, "model")
    assert figure_results([OUTSIDE, LOST], has_mask=True) == [HELD]
    assert figure_results([failed, LOST], has_mask=True) == [FAILED, HELD]
    assert figure_results([OUTSIDE, LOST], has_mask=False) == [HELD], "without a mask it does not apply"
