"""The paper's tables and figures, of the rows of a grid."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from matplotlib.figure import Figure

from delfast.errors import printable
from delfast.experiments.grid.definition import EVERYTHING, ORACLE, ORIGINAL, Grid
from delfast.experiments.grid.figures import plot_budgets, plot_methods
from delfast.experiments.grid.summary import ANYTIME, MEMBERSHIP, STAGES, Mean, Row
from delfast.experiments.reports import FIELDS

BARS = "error bars are 95 % intervals; one seed has no interval"


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and a figure (with the name of its file), a table, or both.

    Cells are text, means with intervals, or None where a run has no such figure.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str | Mean | None]] = ()
    figure: Figure | None = None
    file: str = ""

    @property
    def cells(self) -> list[list[str]]:
        """The table as text, each cell on one line: names from files may hold line breaks and escape sequences."""
        return [["" if cell is None else printable(str(cell)) for cell in row] for row in self.rows]

    def to_csv(self) -> str:
        """The table as CSV. A column of means has a second one beside it: half of the interval."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        pairs = [any(isinstance(row[place], Mean) for row in self.rows) for place in range(len(self.columns))]
        heads = ([name, f"{name} ±"] if pair else [name] for name, pair in zip(self.columns, pairs, strict=True))
        writer.writerow(chain.from_iterable(heads))
        writer.writerows(chain.from_iterable(map(_csv_cells, row, pairs)) for row in self.rows)
        return stream.getvalue()


def _csv_cells(cell: str | Mean | None, is_pair: bool) -> list[Any]:
    if isinstance(cell, Mean):
        return [cell.value, "" if math.isnan(cell.half) else cell.half]
    return ["" if cell is None else printable(cell)] + [""] * is_pair


def sections_of(setting: str, rows: list[Row], grid: Grid) -> list[Section]:
    """Return the tables and figures of one setting that its rows, means over seeds, allow."""
    budget = grid.budget
    ends = [row for row in rows if row["method"] in (ORIGINAL, ORACLE)]
    resets = [row for row in rows if row["method"] == "del"]
    at_budget = [row for row in resets if row["budget"] == budget]
    sections: list[Section] = []

    def of(*strategies: str) -> list[Row]:
        return [row for name in strategies for row in at_budget if row["strategy"] == name]

    tables: list[tuple[str, str, list[Row], Callable[[Row], str]]] = [  # only table 2 is of use with one row
        (
            "Table 1: granularity x criterion",
            f"Reset and finetune, budget {budget:g}. Channels or single elements, ranked by |θ G| or |G|.",
            of("del", "param-weighted", "channel-unweighted", "salloc"),
            _strategy,
        ),
        (
            "Table 2: methods",
            f"Each method without a mask and within masks, of budget {budget:g} unless the name has another.",
            [row for row in rows if row not in ends and (row["method"] != "del" or row["budget"] == budget)],
            lambda row: _within(row, budget),
        ),
        ("Table 3: random control", "Reset and finetune.", of("del", "random", "random-param"), _strategy),
        (
            "Table 4: criteria that do not use the forget set",
            "Reset and finetune.",
            of("del", "weight", "weighted-grad-all", "shallowest", "deepest"),
            _strategy,
        ),
        (
            "Ablation of h",
            "Number of a channel's scores that are averaged: reset and finetune.",
            [row for row in at_budget if row["strategy"] == "del" or row["strategy"].startswith("del-h")],
            _strategy,
        ),
    ]
    for title, text, found, label in tables:
        if len(found) > (not title.startswith("Table 2")):
            sections.append(_table(f"{setting} - {title}", text, ends, found, label))
    if {row["budget"] for row in resets} - {budget}:
        several = [row for row in resets if len({each["budget"] for each in resets if _same(row, each)}) > 1]
        figure = plot_budgets(several, f"{setting}: strategies by budget, reset and finetune") if several else None
        text = f"Reset and finetune; {BARS}; the dotted line is the oracle. Strategies of one budget are left out."
        order = [row["strategy"] for row in resets]
        ordered = sorted(resets, key=lambda row: (order.index(row["strategy"]), row["budget"]))
        title = f"{setting} - Figure 2: strategies by budget"
        table = _table(title, text, ends, ordered, lambda row: f"{row['strategy']}, {row['budget']:g}")
        sections.append(replace(table, figure=figure, file=f"{setting}-budgets.png"))
    masked = [row for row in rows if row["budget"] == budget]
    counts = Counter(row["method"] for row in masked)
    paired = [row for row in masked if counts[row["method"]] > 1]
    if len({row["method"] for row in paired}) > 1:
        figure = plot_methods(paired, f"{setting}: strategies by method, budget {budget:g}")
        text = f"Sizes of the gaps at budget {budget:g}, of methods run with several masks; {BARS}; 0 is the oracle."
        title, file = f"{setting} - Figure 3: strategies by method", f"{setting}-methods.png"
        sections.append(Section(title, text, figure=figure, file=file))
    sections += _anytime(setting, at_budget)
    sections += [_attacks(setting, rows), _times(setting, rows)]
    return sections


def _anytime(setting: str, rows: list[Row]) -> list[Section]:
    """A table of the localizations that stop when they are stable, beside those that read the whole forget set."""
    if not any(ANYTIME[0] in row for row in rows):
        return []
    text = (
        "Reset and finetune. Examples: those that the localization used, of the forget set's. Overlap: Jaccard index "
        "of the last two masks; of all: of the mask with that of all examples. Strategies without a number used all."
    )
    fields = (*ANYTIME, "seconds_localize", "delta_forget", "delta_mia", "delta_test")
    columns = ("strategy", "examples", "of", "overlap", "of all", "localize, s", "Δ forget", "Δ MIA", "Δ test")
    cells = [[_strategy(row), *map(row.get, fields)] for row in rows]
    return [Section(f"{setting} - Anytime localization", text, columns, cells)]


def _same(row: Row, other: Row) -> bool:
    return bool(row["strategy"] == other["strategy"])


def _within(row: Row, budget: float) -> str:
    """The method's name and the strategy of its mask."""
    mask = "" if row["strategy"] == EVERYTHING else f", {row['strategy']} mask"
    return f"{row['method']}{mask}" + ("" if row["budget"] in (None, budget) else f" of {row['budget']:g}")


def _strategy(row: Row) -> str:
    return str(row["strategy"])


def _table(title: str, text: str, ends: list[Row], found: list[Row], label: Callable[[Row], str]) -> Section:
    named = [(str(row["method"]), row) for row in ends] + [(label(row), row) for row in found]
    cells = [[name, str(row["mia"].seeds), *map(row.get, FIELDS)] for name, row in named]
    return Section(title, text, ("", "seeds", *FIELDS.values()), cells)


def _attacks(setting: str, rows: list[Row]) -> Section:
    text = (
        "SalUn's five attacks, each a classifier of one feature: percent of the forget set called non-member. The aim "
        "is the oracle's percentage, not 100. U-LiRA, where there are shadows: accuracy of telling unlearned from "
        "retrained networks; 50 is perfect unlearning."
    )
    found = [row for row in rows if MEMBERSHIP[0] in row]
    cells = [[*_name(row), *map(row.get, MEMBERSHIP)] for row in found]
    return Section(f"{setting} - Membership inference", text, ("method", "strategy", "budget", *MEMBERSHIP), cells)


def _name(row: Row) -> list[str]:
    return [row["method"], row["strategy"], "" if row["budget"] is None else f"{row['budget']:g}"]


def _times(setting: str, rows: list[Row]) -> Section:
    stages = [f"seconds_{stage}" for stage in STAGES]
    cells = [[*_name(row), *map(row.get, stages), row.get("relative_time")] for row in rows]
    return Section(
        f"{setting} - Wall-clock of every stage", "Seconds.", ("method", "strategy", "budget", *STAGES, "RTE"), cells
    )


def sizes_of(rows: list[Row], budget: float) -> list[Section]:
    """A table for each kind of forget set that the settings have in more than one size."""
    found = [row for row in rows if (row["method"], row["strategy"], row["budget"]) == ("del", "del", budget)]
    kinds = [kind for kind in dict.fromkeys(row["forget"] for row in found)]
    sections = []
    for kind in kinds:
        same = sorted((row for row in found if row["forget"] == kind), key=lambda row: row["forget_ratio"])
        if len({row["forget_ratio"] for row in same}) > 1:
            text = f"DEL at budget {budget:g}, by setting; the oracle of each is its own."
            title = f"Size of the forget set: {kind}"
            sections.append(
                _table(title, text, [], same, lambda row: f"{row['setting']}: {100 * row['forget_ratio']:g} %")
            )
    return sections


def hyperparameters(grid: Grid) -> Section:
    """The hyperparameters of each method and variant."""
    rows = []
    for cell in grid.cells:
        values = {**asdict(cell.method), "batch_size": cell.batch_size}
        shown = ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)
        rows.append((cell.label, cell.method.name, shown))
    text = "Of every method and of its variants."
    return Section("Hyperparameters", text, ("name", "method", "hyperparameters"), list(dict.fromkeys(rows)))


def failures(failed: Sequence[Mapping[str, Any]]) -> Section:
    """The runs without a result, each with the reason."""
    columns = ("setting", "seed", "method", "strategy", "budget")
    cells = [[*("" if f["cell"][c] is None else str(f["cell"][c]) for c in columns), f["failed"]] for f in failed]
    text = "These runs have no result, and are left out of the means."
    return Section("Failed", text, (*columns, "why"), cells)
