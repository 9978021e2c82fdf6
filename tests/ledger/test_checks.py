"""Thresholds of acceptance, on figures made up."""

from __future__ import annotations

from typing import Any

import pytest

from delfast.errors import InputError
from delfast.jobs import Accept
from delfast.ledger.checks import advice, check_all, refuse_unmeasured
from delfast.ledger.words import check_sentence

ACCEPT = {"test_drop": 2.0, "attack_advantage": 0.1, "relearn_ratio": 1.5}


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def set_figures(advantage: dict[str, float | None] | None, left_out: int = 0) -> dict[str, Any]:
    return {"count": 30, "attack_advantage": advantage, "attack_left_out": left_out}


def audited(**changes: Any) -> dict[str, Any]:
    sets: dict[str, Any] = {
        "forget": set_figures(figure(0.05)),
        "run 1": set_figures(figure(0.02)),
        "retain": {"attack_advantage": None},
        "test": {"accuracy": figure(89.0, 87.0, 91.0), "attack_advantage": None},
    }
    figures = {"sets": sets, "relearning": {}, "relearn_ratio": figure(1.1, 0.8, 1.4)}
    for name, value in changes.items():
        if name in figures:
            figures[name] = value
        else:
            sets[name.replace("_", " ")] = {**sets.get(name.replace("_", " "), {}), **value}
    return figures


BEFORE = audited(forget={"attack_advantage": figure(0.4)}, relearn_ratio=figure(4.0, 3.0, 5.0))


def held(verified: dict[str, int], audit: dict[str, Any], first: float | None = 90.0) -> dict[str, bool]:
    return {check.name: check.held for check in check_all(ACCEPT, first, verified, audit, BEFORE)}


def test_all_hold() -> None:
    names = ("outside_mask", "test_drop", "attack_advantage", "relearn_ratio")
    assert held({"outside": 0}, audited()) == dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("changes", "first", "name"),
    [
        ({}, 91.5, "test_drop"),
        ({"test": {"accuracy": None}}, 90.0, "test_drop"),
        ({"forget": {"attack_advantage": figure(0.11)}}, 90.0, "attack_advantage"),
        ({"run_1": {"attack_advantage": figure(0.3)}}, 90.0, "attack_advantage"),
        ({"forget": {"attack_advantage": None}}, 90.0, "attack_advantage"),
        ({"relearn_ratio": figure(1.6, 1.2, 2.0)}, 90.0, "relearn_ratio"),
        ({"relearn_ratio": None}, 90.0, "relearn_ratio"),
    ],
)
def test_each_fails_alone(changes: dict[str, Any], first: float, name: str) -> None:
    found = held({"outside": 0}, audited(**changes), first)
    assert [each for each, holds in found.items() if not holds] == [name]


def test_unmeasured_holds_where_the_run_was_told_so() -> None:
    audit = audited(forget={"attack_advantage": None}, relearn_ratio=None)
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audit, BEFORE, accept_unmeasured=True)
    assert all(check.held for check in checks)
    assert {check.name: check.set for check in checks}["attack_advantage"] == "run 1", "earlier sets still count"
    audit = audited(forget={"attack_advantage": None}, run_1={"attack_advantage": figure(0.3)})
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audit, BEFORE, accept_unmeasured=True)
    assert [check.name for check in checks if not check.held] == ["attack_advantage"]


def test_earlier_set_that_cannot_be_measured_is_left_out() -> None:
    assert all(held({"outside": 0}, audited(run_1={"attack_advantage": None})).values())


def test_entry_outside_the_mask() -> None:
    assert not held({"outside": 1}, audited())["outside_mask"]


def test_drop_has_the_interval_of_the_accuracy_after() -> None:
    _, drop, *_ = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), BEFORE)
    assert (drop.value, drop.low, drop.high) == (1.0, -1.0, 3.0)


def test_threshold_that_is_not_asked_for_is_left_out() -> None:
    accept = {**ACCEPT, "relearn_ratio": None}
    names = [check.name for check in check_all(accept, 90.0, {"outside": 0}, audited(relearn_ratio=None), BEFORE)]
    assert names == ["outside_mask", "test_drop", "attack_advantage"]


def test_advice_separates_hidden_from_too_few() -> None:
    hidden = check_all(ACCEPT, 90.0, {"outside": 0}, audited(relearn_ratio=figure(9.0, 3.0, 20.0)), BEFORE)
    unclear = check_all(ACCEPT, 90.0, {"outside": 0}, audited(relearn_ratio=figure(1.8, 0.34, 9.5)), BEFORE)
    assert "hidden, not gone" in advice(hidden, {"method": "del"}, escalated=True)[0]
    assert "train more reference models" in advice(unclear, {"method": "del"}, escalated=True)[0]


def test_advice_names_escalate_where_it_has_settings_left() -> None:
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audited(relearn_ratio=figure(9.0, 3.0, 20.0)), BEFORE)
    for method, escalated, expected in (("del", False, True), ("del", True, False), ("retrain", False, False)):
        lines = advice(checks, {"method": method}, escalated=escalated)
        assert any("--escalate" in line for line in lines) == expected


def test_figure_that_the_model_before_the_run_held_shows_no_forgetting() -> None:
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), BEFORE)
    assert [check.before for check in checks] == [None, 1.0, 0.4, 4.0]
    assert not any(check.held_before for check in checks)
    assert "Before the run: 4.00." in check_sentence(checks[3])
    before = audited(forget={"attack_advantage": figure(0.03)}, relearn_ratio=figure(1.0, 1.0, 1.0))
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), before)
    assert all(check.held for check in checks)
    assert [check.name for check in checks if check.held_before] == ["attack_advantage", "relearn_ratio"]
    assert check_sentence(checks[3]).endswith("this figure does not show that anything was forgotten.")
    assert "does not show" not in check_sentence(checks[1])


def test_attack_that_leaves_out_more_than_a_tenth_is_not_measured() -> None:
    assert all(held({"outside": 0}, audited(forget={"attack_left_out": 3})).values())
    found = audited(forget={"attack_left_out": 4})
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, found, BEFORE)
    assert [check.name for check in checks if not check.held] == ["attack_advantage"]
    assert "the labels of 4 of 30 examples" in check_sentence(checks[2])
    with pytest.raises(InputError, match="no example of the labels of 4 of 30 examples"):
        refuse_unmeasured(Accept(**ACCEPT), found)
    refuse_unmeasured(Accept(**ACCEPT), audited())


def test_reason_is_that_of_the_audit() -> None:
    why = "forget set: expected batches of tensors"
    curves = {"retain": {"ratio_left_out": why}, "forget 10 %": {"left_out": why}}
    found = {**audited(relearn_ratio=None), "relearning": curves}
    *_, ratio = check_all(ACCEPT, 90.0, {"outside": 0}, found, BEFORE)
    assert ratio.reason == why
    assert check_sentence(ratio) == f"Relearning ratio: not measured: {why}. Limit 1.50: did not hold."
    assert why in advice([ratio], {"method": "del"}, escalated=True)[0]
