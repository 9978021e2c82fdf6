"""Every form that an audit can take gives a report: what was not measured is left out of its drawings."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from delfast.ledger.references import references_of, with_members
from delfast.ledger.report import make_report, plots
from tests.ledger.histories import example, held, model_of
from tests.ledger.jobs import make_ledger, persons, write_job
from tests.ledger.pages import Page, changed, words

Figures = dict[str, Any]


def no_accuracy(figures: Figures) -> None:
    """The job has a loss_fn."""
    for values in figures["sets"].values():
        values["accuracy"] = None
    for curves in figures["relearning"].values():
        if "left_out" not in curves:
            curves.update(accuracy=None, control=[[1.1] * len(curves["steps"])])
    figures["classes"] = None


def no_control(figures: Figures) -> None:
    """The first reference knew every measured example, then all of them did."""
    figures["relearning"]["retain"]["control"][0] = []
    figures["relearning"]["forget 10 %"].update(control=[[], []], ratio=None, advantage=None, compared_on=[0, 0])


def no_references(figures: Figures) -> None:
    """The ledger has no references."""
    figures.update(relearning={}, relearn_ratio=None)
    for values in figures["sets"].values():
        values["lira"] = None


def no_attack(figures: Figures) -> None:
    """The forget sets have too few examples for the attack."""
    for values in figures["sets"].values():
        values["attack_advantage"] = None


def partial_attack(figures: Figures) -> None:
    """The test set lacks labels of most forget examples."""
    for name in ("forget", "run 1"):
        if name in figures["sets"]:
            figures["sets"][name].update(attack_left_out=39)


def no_intervals(figures: Figures) -> None:
    """A set of one example, or of equal ones, has no interval."""
    for values in figures["sets"].values():
        for name in ("accuracy", "loss", "attack_advantage"):
            if values[name] is not None:
                values[name].update(low=None, high=None)
    if figures["relearn_ratio"] is not None:
        figures["relearn_ratio"].update(low=figures["relearn_ratio"]["value"], high=figures["relearn_ratio"]["value"])


def one_example(figures: Figures) -> None:
    """A forget set of one example, which finetuning cannot read in parts."""
    no_attack(figures)
    figures["sets"]["forget"].update(count=1, lira=None)
    for name in list(figures["relearning"]):
        if name != "retain":
            figures["relearning"][name] = {"left_out": "1 % of 1 forget example is less than one example"}


FORMS: tuple[tuple[Callable[[Figures], None], ...], ...] = (
    (no_accuracy,),
    (no_control,),
    (no_accuracy, no_control, no_intervals),
    (no_accuracy, no_references, no_attack),
    (no_references, no_intervals),
    (no_attack, no_control),
    (partial_attack, no_intervals),
    (one_example, no_references),
    (one_example, no_accuracy, no_intervals),
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(change.__name__ for change in form))
def test_every_form_of_an_audit_gives_a_report(form: tuple[Callable[[Figures], None], ...]) -> None:
    def change(event: str, payload: dict[str, Any]) -> None:
        if event in ("audited", "baseline"):
            for each in form:
                each(payload["figures"])
        if event == "started" and no_accuracy in form:
            payload["before"] = dict.fromkeys(payload["before"])

    entries = [entry for entry in example() if entry.run in (None, 1)]  # drawings take a tenth of a second each
    markdown, text = make_report(changed(entries, change), held(), today=date(2026, 3, 25))
    page = Page(text)
    assert "Request 1" in words(page.shown) and "nan" not in page.shown.lower().split() and "None" not in page.shown
    drawn = text.count("<svg")
    curves = 0 if no_references in form else 1 if one_example in form else 2
    attacks = not {no_attack, one_example, partial_attack} & {*form}
    assert drawn == 2 + attacks + (no_references not in form) + curves
    if no_accuracy in form:
        assert ">mean loss<" in text and "accuracy (percent)" not in text and "Reversal: loss on every" in page.shown
        assert "Accuracy before" not in page.shown and "of accuracy" not in markdown


def test_a_ledger_of_one_run_has_one_tick() -> None:
    _, axes = plots._panel("run", "y")
    axes.plot([1], [0.5], marker="o")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


LOSS = """

def loss_fn(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


@pytest.mark.long
def test_real_ledgers_of_a_loss_and_of_a_reference_that_knew_all_have_a_report(tmp_path: Path) -> None:
    settings: list[dict[str, object]] = [{"method": "finetune", "epochs": 1, "lr": 0.01}]
    for name in ("loss", "known"):
        folder = tmp_path / name
        folder.mkdir()
        job = write_job(folder, {"attack_advantage": 1.0} if name == "loss" else {"test_drop": 90.0}, settings)
        if name == "loss":
            job.write_text(job.read_text(encoding="utf-8") + LOSS, encoding="utf-8")
        with make_ledger(folder, job, references=2) as ledger:
            positions = list(range(30))
            if name == "known":
                (_, members), *_ = with_members(ledger, references_of(ledger.store))
                positions = members.nonzero().flatten()[:2].tolist()
            ledger.add([persons(0, 300)[position] for position in positions])
            assert ledger.run(device="cpu").accepted
            curves = next(ledger.store.entries("audited")).payload["figures"]["relearning"]["retain"]
            assert (curves["accuracy"] is None) == (name == "loss")
            assert ([] in curves["control"]) == (name == "known")
            ledger.report(tmp_path / f"{name}-report")
        text = (tmp_path / f"{name}-report" / "report.html").read_text(encoding="utf-8")
        assert (">mean loss<" in text) == (name == "loss") and "Trained further on retained examples alone" in text
        assert model_of(1) in text
