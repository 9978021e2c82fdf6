"""The figures of every set that an audit measured, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delfast.ledger.report import wording

SET_COLUMNS = ["set", "examples", "accuracy, %", "loss", "attack advantage (90 %)", "LiRA AUC", "TPR at 1 %, %"]
SET_NAMES = {"forget": "this run's forget set", "retain": "retain set", "test": "test set"}
LEFT_OUT = "control"  # the test set again: a ledger has no other never-seen examples
Rows = list[list[str]]


def set_rows(figures: Mapping[str, Any], baseline: Mapping[str, Any]) -> Rows:
    """A row for each set of the audit; ``baseline``: the figures of the model before the run, for its forget set."""
    sets = figures["sets"]
    earlier = sorted(sets.keys() - SET_NAMES.keys() - {LEFT_OUT}, key=lambda name: (len(name), name))
    rows = [_row(SET_NAMES["forget"], sets["forget"])]
    if baseline:
        rows.append(_row(f"{SET_NAMES['forget']}, before the run", baseline["sets"]["forget"]))
    rows += [_row(f"forget set of {name}", sets[name]) for name in earlier]
    return [*rows, *(_row(SET_NAMES[name], sets[name]) for name in ("retain", "test"))]


def _row(name: str, values: Mapping[str, Any]) -> list[str]:
    lira = values.get("lira") or {}
    return [
        name,
        f"{values['count']:,}",
        wording.interval(values["accuracy"], 1),
        wording.interval(values["loss"], 2),
        wording.interval(values.get("attack_advantage"), 3),
        wording.interval(lira.get("auc"), 2),
        wording.interval(lira.get("tpr_at_1_percent"), 1),
    ]


def class_rows(classes: Mapping[str, list[Mapping[str, float | None] | None]]) -> Rows:
    """A row for each class that the retain set or the test set has, with its accuracy."""
    pairs = zip(classes.get("retain", ()), classes.get("test", ()), strict=True)
    return [
        [str(label), *(wording.interval(each, 1) for each in pair)] for label, pair in enumerate(pairs) if any(pair)
    ]


def accuracies(figures: Mapping[str, Any]) -> str:
    """The accuracies of an audit, of its forget set beside that of references; empty for a job with its own loss."""
    values = {name: figures["sets"][name]["accuracy"] for name in SET_NAMES}
    parts = [f"{name} set {each['value']:.1f} %" for name, each in values.items() if each is not None]
    if parts and (references := _references(figures)) is not None:
        parts.append(f"reference models that never saw the forget set {references:.1f} % of it")
    return ", ".join(parts)


def _references(figures: Mapping[str, Any]) -> float | None:
    """The mean accuracy of the references on the forget examples that they never saw, before any finetuning."""
    curves = figures["relearning"].get("retain", {})
    known = [control[0] for control in curves.get("control", ()) if control]
    return sum(known) / len(known) if known else None
