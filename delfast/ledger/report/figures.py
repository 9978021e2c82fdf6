"""Drawings along the ledger, each with its caption and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import Run
from delfast.ledger.requests import ACCEPTED

Rows = list[list[str]]


@dataclass(frozen=True)
class Drawing:
    """A drawing, its caption, and its numbers as a table."""

    svg: Markup
    caption: str
    reading: str
    """Words on the drawing's marks, which a report without drawings leaves out."""
    columns: list[str]
    rows: Rows

    @property
    def text_columns(self) -> int:
        """Number of columns, from the first, that hold words."""
        return 2 if "status" in self.columns else 1


def figures_of(runs: list[Run]) -> list[Drawing]:
    """Return the drawings along the ledger's audited runs."""
    audited = [run for run in runs if run.figures is not None]
    if not audited:
        return []
    returns = _returns(audited)
    gains = {name: points[-1][1] - points[0][1] for name, points in returns.items()}
    worst = sorted(gains, key=lambda name: -gains[name])[: plots.NAMED]
    return [
        Drawing(
            plots.draw_erosion(audited),
            "Erosion: what the model still can. Each request may cost some accuracy, and the cost adds up.",
            "Hollow points are runs that were not accepted. Bars are 95 % intervals.",
            ["run", "status", "retain set, %", "test set, %"],
            [
                [*_run_cells(run), _set(run, "retain", "accuracy", 1), _set(run, "test", "accuracy", 1)]
                for run in audited
            ],
        ),
        Drawing(
            plots.draw_reversal(audited, worst, returns),
            "Reversal: accuracy on every forget set, from its own run on. A rise from run to run is a sign that it "
            "comes back.",
            "So is a line above the dotted one.",
            ["request", "first run", "accuracy then, %", "newest run", "accuracy now, %", "rise, points"],
            [
                [
                    name,
                    *(str(part) for number, value in (points[0], points[-1]) for part in (number, f"{value:.1f}")),
                    f"{gains[name]:+.1f}",
                ]
                for name, points in returns.items()
            ],
        ),
        Drawing(
            plots.draw_attack(audited),
            "Attack: how well an attacker separates the forget set from never-seen examples. 0 is guessing, 1 is "
            "always right.",
            "",
            ["run", "status", "attack advantage", "limit"],
            [
                [*_run_cells(run), _set(run, "forget", "attack_advantage", 3), _limit(run, "attack_advantage")]
                for run in audited
            ],
        ),
        Drawing(
            plots.draw_ratios(audited),
            "Relearning: odds of answering a forgotten example correctly in a short finetuning, over those of networks "
            "that never saw it. Far above 1 means hidden, not gone.",
            "",
            ["run", "status", "relearning ratio", "limit"],
            [[*_run_cells(run), _ratio(run), _limit(run, "relearn_ratio")] for run in audited],
        ),
    ]


def _returns(runs: list[Run]) -> dict[str, list[tuple[int, float]]]:
    """Return, for every accepted forget set, the accuracy on it at its own run and at each later accepted run.

    Requests of one run have one line until a later audit measures them one by one.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for run in (run for run in runs if run.status == ACCEPTED):
        assert run.figures is not None  # the caller's runs are audited
        sets = run.figures["sets"]
        for name, measured in sets.items():
            if name not in ("forget", "retain", "test", "control") and measured["accuracy"] is not None:
                found.setdefault(name, []).append((run.number, measured["accuracy"]["value"]))
        if sets["forget"]["accuracy"] is not None:
            for number in run.requests:
                found[f"request {number}"] = [(run.number, sets["forget"]["accuracy"]["value"])]
    return found


def _run_cells(run: Run) -> list[str]:
    return [str(run.number), run.status]


def _set(run: Run, name: str, field: str, digits: int) -> str:
    assert run.figures is not None  # the caller's runs are audited
    return wording.interval((run.figures["sets"].get(name) or {}).get(field), digits)


def _ratio(run: Run) -> str:
    assert run.figures is not None  # the caller's runs are audited
    return wording.interval(run.figures["relearn_ratio"], 2)


def _limit(run: Run, name: str) -> str:
    check = run.asked(name)
    return "" if check is None else f"{check['limit']:g}"
