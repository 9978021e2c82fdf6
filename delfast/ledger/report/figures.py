"""Drawings along the ledger, each with its caption and its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from delfast.ledger.events import ACCEPTED
from delfast.ledger.report import plots, wording
from delfast.ledger.report.history import Run, is_forget_set

Rows = list[list[str]]
UNITS = {"accuracy": (", %", 1), "loss": ("", 3)}  # and the decimals


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
    """Return the drawings along the ledger's audited runs; one without a measured figure is left out."""
    audited = [run for run in runs if run.figures is not None]
    if not audited:
        return []
    measure = _measure_of(audited)
    drawings = [_erosion(audited, measure), _reversal(audited, measure), _attack(audited), _relearning(audited)]
    return [drawing for drawing in drawings if drawing is not None]


def _measure_of(runs: list[Run]) -> str:
    """Return the measure that the drawings show: the loss for a job with its own loss, which has no accuracy."""
    sets = (run.figures["sets"].values() for run in runs if run.figures is not None)
    return "accuracy" if any(each["accuracy"] is not None for found in sets for each in found) else "loss"


def _erosion(runs: list[Run], measure: str) -> Drawing:
    unit, digits = UNITS[measure]
    fall = "Each request may cost some accuracy" if measure == "accuracy" else "Each request may raise the loss"
    return Drawing(
        plots.draw_erosion(runs, measure),
        f"Erosion: the accuracy that earlier requests have cost. {fall}, and the cost adds up.",
        "Hollow points are runs that did not pass. Bars are 95 % intervals.",
        ["run", "status", *(f"{name} set{unit}" for name in ("retain", "test"))],
        [[*_run_cells(run), *(_set(run, name, measure, digits) for name in ("retain", "test"))] for run in runs],
    )


def _reversal(runs: list[Run], measure: str) -> Drawing | None:
    returns = _returns(runs, measure)
    if not returns:
        return None
    unit, digits = UNITS[measure]
    changes = {name: points[-1][1] - points[0][1] for name, points in returns.items()}
    sign = 1 if measure == "accuracy" else -1  # what comes back has a higher accuracy, or a lower loss
    worst = sorted(changes, key=lambda name: -sign * changes[name])[: plots.NAMED]
    back, far = ("rise", "above") if measure == "accuracy" else ("fall", "below")
    return Drawing(
        plots.draw_reversal(runs, worst, returns, measure),
        f"Reversal: {measure} on every forget set, from its own run on. A {back} from run to run is a sign that it "
        "comes back.",
        f"A line far {far} the dotted one is a sign that the examples are still known.",
        ["forget set of", "first run", f"{measure} then{unit}", "newest run", f"{measure} now{unit}", "change"],
        [
            [
                name,
                *(str(part) for number, value in (points[0], points[-1]) for part in (number, f"{value:.{digits}f}")),
                f"{changes[name]:+.{digits}f}",
            ]
            for name, points in returns.items()
        ],
    )


def _attack(runs: list[Run]) -> Drawing | None:
    if all(run.largest_attack is None for run in runs):
        return None
    return Drawing(
        plots.draw_attack(runs),
        "Attack: how well an attacker separates a forget set from never-seen examples. 0 is guessing, 1 is always "
        "right. The limit is for a run's own forget set; an earlier one rejects a run if its whole interval is above. "
        "Ranges hold the true figure about 90 % of the time.",
        "",
        ["run", "status", "its forget set", "largest of all", "limit"],
        [
            [
                *_run_cells(run),
                _set(run, "forget", "attack_advantage", 3),
                wording.interval(run.largest_attack, 3),
                _limit(run, "attack_advantage"),
            ]
            for run in runs
        ],
    )


def _relearning(runs: list[Run]) -> Drawing | None:
    if all(run.figures is None or run.figures["relearn_ratio"] is None for run in runs):
        return None
    return Drawing(
        plots.draw_ratios(runs),
        "Relearning: how much more of the forget set comes back in a short finetuning than in networks that never saw "
        "it, as a ratio. Far above 1 means hidden, not gone.",
        "",
        ["run", "status", "relearning ratio", "limit"],
        [[*_run_cells(run), _ratio(run), _limit(run, "relearn_ratio")] for run in runs],
    )


def _returns(runs: list[Run], measure: str) -> dict[str, list[tuple[int, float]]]:
    """Return, for the forget set of every accepted run, a measure at that run and at each later accepted one."""
    found: dict[str, list[tuple[int, float]]] = {}
    for run in (run for run in runs if run.status == ACCEPTED):
        assert run.figures is not None  # the caller's runs are audited
        for name, measured in run.figures["sets"].items():
            if measured[measure] is not None and is_forget_set(name):
                own = f"run {run.number}" if name == "forget" else name
                found.setdefault(own, []).append((run.number, measured[measure]["value"]))
    return found


def _run_cells(run: Run) -> list[str]:
    return [str(run.number), wording.RUN_STATUS[run.status]]


def _set(run: Run, name: str, field: str, digits: int) -> str:
    assert run.figures is not None  # the caller's runs are audited
    return wording.interval((run.figures["sets"].get(name) or {}).get(field), digits)


def _ratio(run: Run) -> str:
    assert run.figures is not None  # the caller's runs are audited
    return wording.interval(run.figures["relearn_ratio"], 2)


def _limit(run: Run, name: str) -> str:
    check = run.asked(name)
    return "" if check is None else f"{check.limit:g}"
