"""Thresholds of acceptance, on figures made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from delfast.errors import InputError
from delfast.evaluation import threshold_attack
from delfast.jobs import Accept
from delfast.ledger import Check
from delfast.ledger.checks import advice, check_all, refuse_unmeasured
from delfast.ledger.evidence import BLIND, UNMEASURED, result_of, row_of, sentence_of

ACCEPT = {"test_drop": 2.0, "attack_advantage": 0.1, "relearn_ratio": 1.5}


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def sentence(check: Check) -> str:
    return sentence_of(check, has_mask=True, has_accuracy=True)


def set_figures(advantage: dict[str, float | None] | None, left_out: int = 0) -> dict[str, Any]:
    return {"count": 30, "attack_advantage": advantage, "attack_left_out": left_out}


def audited(**changes: Any) -> dict[str, Any]:
    sets: dict[str, Any] = {
        "forget": set_figures(figure(0.05)),
        "run 1": set_figures(figure(0.02, 0.0, 0.3)),
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
    names = ("outside_mask", "test_drop", "attack_advantage", "earlier_attack_advantage", "relearn_ratio")
    assert held({"outside": 0}, audited()) == dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("changes", "first", "name"),
    [
        ({}, 91.5, "test_drop"),
        ({"test": {"accuracy": None}}, 90.0, "test_drop"),
        ({"forget": {"attack_advantage": figure(0.11)}}, 90.0, "attack_advantage"),
        ({"run_1": {"attack_advantage": figure(0.3, 0.11, 0.5)}}, 90.0, "earlier_attack_advantage"),
        ({"forget": {"attack_advantage": None}}, 90.0, "attack_advantage"),
        ({"relearn_ratio": figure(1.6, 1.2, 2.0)}, 90.0, "relearn_ratio"),
        ({"relearn_ratio": None}, 90.0, "relearn_ratio"),
    ],
)
def test_each_fails_alone(changes: dict[str, Any], first: float, name: str) -> None:
    found = held({"outside": 0}, audited(**changes), first)
    assert [each for each, holds in found.items() if not holds] == [name]


def by_name(audit: dict[str, Any], before: dict[str, Any] = BEFORE, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in check_all(ACCEPT, 90.0, {"outside": 0}, audit, before, **options)}


def test_unmeasured_holds_where_the_run_accepts_it_and_stays_visible() -> None:
    audit = audited(forget={"attack_advantage": None}, relearn_ratio=None)
    checks = by_name(audit, accept_unmeasured=True)
    assert all(check.held for check in checks.values())
    assert (checks["attack_advantage"].value, checks["attack_advantage"].set) == (None, "forget")
    assert checks["attack_advantage"].reason == "it needs at least 2 examples, the forget set has 30"
    assert checks["earlier_attack_advantage"].value == 0.02
    assert [result_of(check, has_mask=True) for check in checks.values()].count(UNMEASURED) == 2
    audit = audited(forget={"attack_advantage": None}, run_1={"attack_advantage": figure(0.3, 0.2, 0.4)})
    found = by_name(audit, accept_unmeasured=True).values()
    assert [check.name for check in found if not check.held] == ["earlier_attack_advantage"]


def test_figure_of_the_new_set_is_shown_where_an_earlier_set_has_a_larger_one() -> None:
    before = audited(
        forget={"attack_advantage": figure(0.6)}, run_1={"attack_advantage": figure(0.07, 0.0, 0.2)}, relearn_ratio=None
    )
    checks = by_name(audited(run_1={"attack_advantage": figure(0.08, 0.0, 0.2)}), before)
    new, earlier = checks["attack_advantage"], checks["earlier_attack_advantage"]
    assert (new.set, new.value, new.before, new.held_before) == ("forget", 0.05, 0.6, False)
    assert (earlier.set, earlier.value, earlier.before, earlier.held_before) == ("run 1", 0.08, 0.07, False)
    assert row_of(earlier, has_mask=True)[1:3] == ["0.080", "0.000 to 0.200 (90 %)"]
    assert result_of(earlier, has_mask=True) != BLIND


def test_earlier_set_rejects_by_the_lower_end_of_its_interval() -> None:
    sets = {"run_1": {"attack_advantage": figure(0.4, 0.05, 0.7)}}
    held = by_name(audited(**sets))["earlier_attack_advantage"]
    assert held.held and held.value == 0.4
    assert "The limit is for the lower end of the interval." in sentence(held)
    sets["run_2"] = set_figures(figure(0.3, 0.2, 0.4))
    failed = by_name(audited(**sets))["earlier_attack_advantage"]
    assert (failed.held, failed.set, failed.value) == (False, "run 2", 0.3), "the one that rejects is named"


@pytest.mark.parametrize("size", [2, 5, 10])
def test_earlier_sets_that_no_network_saw_are_held(size: int) -> None:
    """The largest of ten advantages of few examples is above 0.25 in most ledgers, also after retraining."""
    generator, held, above = torch.Generator().manual_seed(0), 0, 0
    accept = {"test_drop": None, "attack_advantage": 0.25, "relearn_ratio": None}
    for seed in range(20):
        members = [torch.randn(size, generator=generator) for _ in range(10)]
        found = [threshold_attack(each, torch.randn(200, generator=generator), seed=seed) for each in members]
        sets = {f"run {run}": set_figures(each.as_dict()) for run, each in enumerate(found, start=1)}
        audit = {"sets": {"forget": set_figures(figure(0.0, 0.0, 0.1)), **sets}}
        *_, earlier = check_all(accept, 90.0, {"outside": 0}, audit, {"sets": {}})
        held += earlier.held
        above += earlier.value is not None and earlier.value > 0.25
    assert held == 20
    assert above > 2, "by the figure itself more than one ledger in ten would be rejected"


def test_earlier_set_that_cannot_be_measured_is_counted() -> None:
    unmeasured = {"run_1": {"attack_advantage": None}}
    check = by_name(audited(**unmeasured))["earlier_attack_advantage"]
    assert check.held and check.value is None
    words = (
        "not measured: 1 of 1 earlier sets cannot be measured. It does not count against the run: each run before was "
        "accepted without it."
    )
    assert sentence(check) == f"Attack advantage, earlier sets: {words}"
    check = by_name(audited(**unmeasured, run_2=set_figures(figure(0.05, 0.0, 0.2))))["earlier_attack_advantage"]
    assert (check.held, check.value, check.set) == (True, 0.05, "run 2")
    assert sentence(check).endswith("1 of 2 earlier sets cannot be measured.")


def test_entry_outside_the_mask() -> None:
    assert not held({"outside": 1}, audited())["outside_mask"]


def test_drop_has_the_interval_of_the_accuracy_after() -> None:
    _, drop, *_ = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), BEFORE)
    assert (drop.value, drop.low, drop.high) == (1.0, -1.0, 3.0)


def test_threshold_that_is_not_asked_for_is_left_out() -> None:
    accept = {**ACCEPT, "relearn_ratio": None}
    names = [check.name for check in check_all(accept, 90.0, {"outside": 0}, audited(relearn_ratio=None), BEFORE)]
    assert names == ["outside_mask", "test_drop", "attack_advantage", "earlier_attack_advantage"]


DEL, RETRAIN = {"method": "del"}, {"method": "retrain"}


def failing(**changes: Any) -> list[Check]:
    """Return the checks of a run that is rejected."""
    return [*by_name(audited(**changes)).values()]


def test_advice_separates_hidden_from_too_few() -> None:
    hidden = failing(relearn_ratio=figure(9.0, 3.0, 20.0))
    unclear = failing(relearn_ratio=figure(1.8, 0.34, 9.5))
    assert "hidden, not gone" in advice(hidden, [DEL, DEL])[0]
    assert "train more reference models" in advice(unclear, [DEL, DEL])[0]


def test_advice_names_escalate_where_it_has_settings_left() -> None:
    checks = failing(relearn_ratio=figure(9.0, 3.0, 20.0))
    for attempts, expected in (([DEL], True), ([DEL, RETRAIN], False), ([RETRAIN], False)):
        assert any("--escalate" in line for line in advice(checks, attempts)) == expected


def test_advice_does_not_repeat_what_was_tried_or_cannot_help() -> None:
    checks = failing(run_1={"attack_advantage": figure(0.5, 0.3, 0.7)}, forget={"attack_advantage": figure(0.2)})
    new, earlier, _ = advice(checks, [DEL])
    assert "Try a larger budget" in new
    assert "A larger budget for the new ones does not change that. Try retraining" in earlier
    assert earlier.startswith("earlier_attack_advantage: attack advantage, earlier sets 0.500 on the forget set of run")
    for line in advice(checks, [DEL, RETRAIN]):
        assert "Retraining was tried" in line and "Try" not in line


def test_figure_that_the_model_before_the_run_held_shows_no_forgetting() -> None:
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), BEFORE)
    assert [check.before for check in checks] == [None, 1.0, 0.4, 0.02, 4.0]
    assert not any(check.held_before for check in checks)
    assert row_of(checks[4], has_mask=True)[4] == "4.00"
    before = audited(forget={"attack_advantage": figure(0.03)}, relearn_ratio=figure(1.0, 1.0, 1.0))
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, audited(), before)
    assert all(check.held for check in checks)
    assert [check.name for check in checks if check.held_before] == ["attack_advantage", "relearn_ratio"]
    assert result_of(checks[4], has_mask=True) == BLIND and result_of(checks[1], has_mask=True) != BLIND


def test_attack_that_leaves_out_more_than_a_tenth_is_not_measured() -> None:
    assert all(held({"outside": 0}, audited(forget={"attack_left_out": 3})).values())
    found = audited(forget={"attack_left_out": 4})
    checks = check_all(ACCEPT, 90.0, {"outside": 0}, found, BEFORE)
    assert [check.name for check in checks if not check.held] == ["attack_advantage"]
    assert "the labels of 4 of 30 examples" in sentence(checks[2])
    with pytest.raises(InputError, match="no example of the labels of 4 of 30 examples"):
        refuse_unmeasured(Accept(**ACCEPT), found)
    refuse_unmeasured(Accept(**ACCEPT), audited())


def test_reason_is_that_of_the_audit() -> None:
    why = "forget set: expected batches of tensors"
    curves = {"retain": {"ratio_left_out": why}, "forget 10 %": {"left_out": why}}
    found = {**audited(relearn_ratio=None), "relearning": curves}
    *_, ratio = check_all(ACCEPT, 90.0, {"outside": 0}, found, BEFORE)
    assert ratio.reason == why
    assert sentence(ratio) == f"Relearning ratio: not measured: {why}."
    assert why in advice([ratio], [DEL, DEL])[0]
