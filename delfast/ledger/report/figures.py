"""Drawings along the ledger, each with its caption and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from delfast.ledger.events import ACCEPTED
from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import Run, is_forget_set

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
            "A line far above the dotted one is a sign that the examples are still known.",
            ["forget set of", "first run", "accuracy then, %", "newest run", "accuracy now, %", "rise, points"],
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
            "Attack: how well an attacker separates a forget set from never-seen examples. 0 is guessing, 1 is always "
            "right. The limit is for the largest of all forget sets so far.",
            "",
            ["run", "status", "its forget set", "largest of all", "limit"],
            [
                [
                    *_run_cells(run),
                    _set(run, "forget", "attack_advantage", 3),
                    wording.interval(run.largest_attack, 3),
                    _limit(run, "attack_advantage"),
                ]
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
    """Return, for the forget set of every accepted run, its accuracy at that run and at each later accepted one."""
    found: dict[str, list[tuple[int, float]]] = {}
    for run in (run for run in runs if run.status == ACCEPTED):
        assert run.figures is not None  # the caller's runs are audited
        for name, measured in run.figures["sets"].items():
            if measured["accuracy"] is not None and is_forget_set(name):
                own = f"run {run.number}" if name == "forget" else name
                found.setdefault(own, []).append((run.number, measured["accuracy"]["value"]))
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
    return "" if check is None else f"{check.limit:g}"
