"""Checks in words: signs, units, sets, intervals, and what was not measured."""

from __future__ import annotations

import pytest

from delfast.ledger import Check
from delfast.ledger.words import check_sentence, failure, verdict

LOST = Check("test_drop", 0.5, 2.0, True, "test", -0.4, 1.4)
GAINED = Check("test_drop", -0.25, 2.0, True, "test", -1.0, 2.5)
EARLIER = Check("attack_advantage", 0.3, 0.25, False, "run 3", 0.1, 0.5)
ALIKE = Check("relearn_ratio", 1.0, 1.5, True, "forget", 1.0, 1.0)
UNMEASURED = Check("relearn_ratio", None, 1.5, False, "forget")
TOLD = Check("relearn_ratio", None, 1.5, True, "forget", reason="too few")
FAILED = Check("method", None, None, False, "the loss is not finite")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (LOST, "is 0.50 points below that of the ledger's first model. Limit 2.00 points: held."),
        (LOST, "95 % interval -0.40 to 1.40."),
        (GAINED, "is 0.25 points above that of the ledger's first model."),
        (GAINED, "95 % interval -1.00 to 2.50, which reaches above the limit."),
        (EARLIER, "separated the forget set of run 3 from never-seen examples with an advantage of 0.300"),
        (EARLIER, "Limit 0.250: did not hold. 95 % interval 0.100 to 0.500."),
        (ALIKE, "Limit 1.50: held. No interval: all examples had the same figure."),
        (UNMEASURED, "Relearning ratio: not measured. Limit 1.50: did not hold."),
        (TOLD, "Relearning ratio: not measured: too few. The run accepts this by --accept-unmeasured."),
        (FAILED, "The method failed: the loss is not finite."),
    ],
)
def test_sentence(check: Check, words: str) -> None:
    assert words in check_sentence(check)


def test_a_failure_names_the_set_of_an_earlier_run() -> None:
    assert failure(EARLIER) == "attack advantage 0.300 on the forget set of run 3, limit 0.250"
    assert failure(UNMEASURED) == "relearning ratio not measured, limit 1.50"
    assert failure(FAILED) == "the method failed (the loss is not finite)"


def test_what_was_not_measured_is_not_said_to_have_held() -> None:
    assert verdict([LOST, ALIKE]) == "all thresholds held"
    assert verdict([LOST, TOLD]) == "all thresholds held that were measured; 1 of 2 figures were not"
