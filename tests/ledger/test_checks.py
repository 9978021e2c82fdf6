"""Thresholds of acceptance, on figures made up."""

from __future__ import annotations

from typing import Any

import pytest

from delfast.ledger.checks import advice, check_all

ACCEPT = {"test_drop": 2.0, "attack_advantage": 0.1, "relearn_ratio": 1.5}


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def audited(**changes: Any) -> dict[str, Any]:
    sets: dict[str, Any] = {
        "forget": {"attack_advantage": figure(0.05)},
        "run 1": {"attack_advantage": figure(0.02)},
        "retain": {"attack_advantage": None},
        "test": {"accuracy": figure(89.0, 87.0, 91.0), "attack_advantage": None},
    }
    figures = {"sets": sets, "relearn_ratio": figure(1.1, 0.8, 1.4)}
    for name, value in changes.items():
        if name in figures:
            figures[name] = value
        else:
            sets[name.replace("_", " ")] = {**sets.get(name.replace("_", " "), {}), **value}
    return {"figures": figures}


def held(verified: dict[str, int], audit: dict[str, Any], first: float | None = 90.0) -> dict[str, bool]:
    return {check.name: check.held for check in check_all(ACCEPT, first, verified, audit)}


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
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audit, accept_unmeasured=True)
    assert all(check.held for check in checks)
    assert {check.name: check.set for check in checks}["attack_advantage"] == "run 1", "earlier sets still count"
    audit = audited(forget={"attack_advantage": None}, run_1={"attack_advantage": figure(0.3)})
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audit, accept_unmeasured=True)
    assert [check.name for check in checks if not check.held] == ["attack_advantage"]


def test_earlier_set_that_cannot_be_measured_is_left_out() -> None:
    assert all(held({"outside": 0}, audited(run_1={"attack_advantage": None})).values())


def test_entry_outside_the_mask() -> None:
    assert not held({"outside": 1}, audited())["outside_mask"]


def test_drop_has_the_interval_of_the_accuracy_after() -> None:
    _, drop, *_ = check_all(ACCEPT, 90.0, {"outside": 0}, audited())
    assert (drop.value, drop.low, drop.high) == (1.0, -1.0, 3.0)


def test_threshold_that_is_not_asked_for_is_left_out() -> None:
    accept = {**ACCEPT, "relearn_ratio": None}
    names = [check.name for check in check_all(accept, 90.0, {"outside": 0}, audited(relearn_ratio=None))]
    assert names == ["outside_mask", "test_drop", "attack_advantage"]


def test_advice_separates_hidden_from_too_few() -> None:
    hidden = check_all(ACCEPT, 90.0, {"outside": 0}, audited(relearn_ratio=figure(9.0, 3.0, 20.0)))
    unclear = check_all(ACCEPT, 90.0, {"outside": 0}, audited(relearn_ratio=figure(1.8, 0.34, 9.5)))
    assert "hidden, not gone" in advice(hidden, {"method": "del"}, escalated=True)[0]
    assert "train more references" in advice(unclear, {"method": "del"}, escalated=True)[0]
