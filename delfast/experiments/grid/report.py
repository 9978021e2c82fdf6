"""The report of a grid: the paper's tables and figures, as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from delfast.errors import printable
from delfast.experiments.grid.definition import EVERYTHING, ORACLE, ORIGINAL, Grid
from delfast.experiments.grid.figures import plot_budgets, plot_methods
from delfast.experiments.grid.summary import ANYTIME, MEMBERSHIP, STAGES, Row, means
from delfast.experiments.reports import FIELDS, markdown_table, markdown_text
from delfast.files import make_output_dir

FIGURES = "figures"  # the folder of the plots
MEANING = """Percentages, mean ± half of the 95 % interval over seeds (Student's t). The number of seeds differs from
row to row. Δ = oracle - method: the nearer to 0, the better. MIA: percent of the forget set that membership inference
calls non-member. KL: divergence of the method's predictions from the oracle's, in nats. Changed: percent of the
parameters that differ from the original's. RTE: run time relative to retraining, localization included. RTE is empty
where, for one of the seeds, the oracle was trained with another device, platform, torch, number of threads or kernels
(the CPU's instruction set, or the build for CUDA and its card). Seconds are wall-clock times and include the effect of
other work on the machine."""
BARS = "error bars are 95 % intervals; one seed has no interval"


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and a figure (its path), a table, or both."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Path | None = None


def make_report(
    grid: Grid, rows: Sequence[Row], failed: Sequence[Mapping[str, Any]], directory: Path, footer: str
) -> tuple[str, str, list[Path]]:
    """Return Markdown and HTML with every table and figure that the rows allow, and the figures' paths.

    Figures are written to ``directory``/figures. Names are shown as text, whatever they hold.
    """
    grid, footer = replace(grid, title=printable(grid.title)), printable(footer)
    sections: list[Section] = []
    make_output_dir(directory / FIGURES)
    averaged = means(rows)
    for setting in dict.fromkeys(row["setting"] for row in averaged):
        sections += _of_setting(setting, [row for row in averaged if row["setting"] == setting], grid, directory)
    sections += [*_sizes(averaged, grid.budget), _hyperparameters(grid)]
    if failed:
        columns = ("setting", "seed", "method", "strategy", "budget")
        cells = [[*("" if f["cell"][c] is None else str(f["cell"][c]) for c in columns), f["failed"]] for f in failed]
        text = "These runs have no result, and are left out of the means."
        sections.append(Section("Failed", text, (*columns, "why"), cells))
    sections = [Section(grid.title, MEANING), *map(_on_lines, sections)]
    figures = [section.figure for section in sections if section.figure is not None]
    return _markdown(sections, footer), _html(grid.title, sections, footer), figures


def _on_lines(section: Section) -> Section:
    """The section with every text on one line: names from files may hold line breaks and escape sequences."""
    rows = [list(map(printable, row)) for row in section.rows]
    return replace(section, title=printable(section.title), text=printable(section.text), rows=rows)


def _of_setting(setting: str, rows: list[Row], grid: Grid, directory: Path) -> list[Section]:
    budget, first = grid.budget, rows[0]
    ends = [row for row in rows if row["method"] in (ORIGINAL, ORACLE)]
    resets = [row for row in rows if row["method"] == "del"]
    at_budget = [row for row in resets if row["budget"] == budget]
    share = f"{100 * first['forget_ratio']:g} % of the training set"
    sections = [Section(f"Setting {setting}", f"Forget set {first['forget']}, {share}.")]

    def named(*strategies: str) -> list[Row]:
        return [row for name in strategies for row in at_budget if row["strategy"] == name]

    tables: list[tuple[str, str, list[Row], Callable[[Row], str]]] = [  # only table 2 is of use with one row
        (
            "Table 1: granularity x criterion",
            f"Reset and finetune, budget {budget:g}. Channels or single parameters, ranked by |θ G| or |G|.",
            named("del", "param-weighted", "channel-unweighted", "salloc"),
            _strategy,
        ),
        (
            "Table 2: methods",
            f"Each method without a mask and within masks, of budget {budget:g} unless the name has another.",
            [row for row in rows if row not in ends and (row["method"] != "del" or row["budget"] == budget)],
            lambda row: _within(row, budget),
        ),
        ("Table 3: random control", "Reset and finetune.", named("del", "random", "random-param"), _strategy),
        (
            "Table 4: criteria that do not use the forget set",
            "Reset and finetune.",
            named("del", "weight", "weighted-grad-all", "shallowest", "deepest"),
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
        path = directory / FIGURES / f"{setting}-budgets.png"
        plot_budgets(resets, path, f"{setting}: strategies by budget, reset and finetune")
        text = f"Reset and finetune; {BARS}; the dotted line is the oracle."
        order = [row["strategy"] for row in resets]
        ordered = sorted(resets, key=lambda row: (order.index(row["strategy"]), row["budget"]))
        title = f"{setting} - Figure 2: strategies by budget"
        table = _table(title, text, ends, ordered, lambda row: f"{row['strategy']}, {row['budget']:g}")
        sections.append(replace(table, figure=path))
    masked = [row for row in rows if row["budget"] == budget]
    counts = Counter(row["method"] for row in masked)
    paired = [row for row in masked if counts[row["method"]] > 1]
    if len({row["method"] for row in paired}) > 1:
        path = directory / FIGURES / f"{setting}-methods.png"
        plot_methods(paired, path, f"{setting}: strategies by method, budget {budget:g}")
        text = f"Sizes of the gaps at budget {budget:g}, of methods run with several masks; {BARS}; 0 is the oracle."
        sections.append(Section(f"{setting} - Figure 3: strategies by method", text, figure=path))
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
    cells = [[_strategy(row), *(str(row.get(name, "")) for name in fields)] for row in rows]
    return [Section(f"{setting} - Anytime localization", text, columns, cells)]


def _within(row: Row, budget: float) -> str:
    """The method's name and the strategy of its mask."""
    mask = "" if row["strategy"] == EVERYTHING else f", {row['strategy']} mask"
    return f"{row['method']}{mask}" + ("" if row["budget"] in (None, budget) else f" of {row['budget']:g}")


def _strategy(row: Row) -> str:
    return str(row["strategy"])


def _table(title: str, text: str, ends: list[Row], found: list[Row], label: Callable[[Row], str]) -> Section:
    named = [(str(row["method"]), row) for row in ends] + [(label(row), row) for row in found]
    cells = [[name, str(row["mia"].seeds), *(str(row.get(field, "")) for field in FIELDS)] for name, row in named]
    return Section(title, text, ("", "seeds", *FIELDS.values()), cells)


def _attacks(setting: str, rows: list[Row]) -> Section:
    text = (
        "SalUn's five attacks, each a classifier of one feature: percent of the forget set called non-member. The aim "
        "is the oracle's percentage, not 100. U-LiRA, where there are shadows: accuracy of telling unlearned from "
        "retrained networks; 50 is perfect unlearning."
    )
    found = [row for row in rows if MEMBERSHIP[0] in row]
    cells = [[*_name(row), *(str(row.get(attack, "")) for attack in MEMBERSHIP)] for row in found]
    return Section(f"{setting} - Membership inference", text, ("method", "strategy", "budget", *MEMBERSHIP), cells)


def _name(row: Row) -> list[str]:
    return [row["method"], row["strategy"], "" if row["budget"] is None else f"{row['budget']:g}"]


def _times(setting: str, rows: list[Row]) -> Section:
    stages = [f"seconds_{stage}" for stage in STAGES]
    cells = [
        [*_name(row), *(str(row.get(stage, "")) for stage in stages), str(row.get("relative_time", ""))] for row in rows
    ]
    return Section(
        f"{setting} - Wall-clock of every stage", "Seconds.", ("method", "strategy", "budget", *STAGES, "RTE"), cells
    )


def _sizes(rows: list[Row], budget: float) -> list[Section]:
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


def _hyperparameters(grid: Grid) -> Section:
    """The hyperparameters of each method and variant."""
    rows = []
    for cell in grid.cells:
        values = {**asdict(cell.method), "batch_size": cell.batch_size}
        shown = ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)
        rows.append((cell.label, cell.method.name, shown))
    text = "Of every method and of its variants."
    return Section("Hyperparameters", text, ("name", "method", "hyperparameters"), list(dict.fromkeys(rows)))


def _markdown(sections: list[Section], footer: str) -> str:
    parts = []
    for number, section in enumerate(sections):
        title = markdown_text(section.title)
        text = "\n".join(map(markdown_text, section.text.splitlines()))
        parts.append(f"{'#' if not number else '##'} {title}\n\n{text}\n")
        if section.figure is not None:
            parts.append(f"![{title}]({FIGURES}/{section.figure.name})\n")
        if section.rows:
            parts.append(markdown_table(section.columns, [list(map(markdown_text, row)) for row in section.rows]))
    return "\n".join([*parts, markdown_text(footer) + "\n"])


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 75em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th { border-bottom: 1px solid #444; }
td, th { padding: .2em .7em; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f5f5; } img { max-width: 100%; } footer { color: #666; font-size: 12px; }
"""


def _html(title: str, sections: list[Section], footer: str) -> str:
    body = []
    for number, section in enumerate(sections):
        level = 1 if not number else 2
        body.append(f"<h{level}>{html.escape(section.title)}</h{level}><p>{html.escape(section.text)}</p>")
        if section.figure is not None:
            image = base64.b64encode(section.figure.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{image}">')
        if section.rows:
            head = "".join(f"<th>{html.escape(column)}</th>" for column in section.columns)
            rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in section.rows)
            lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
            body.append(f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + f"\n<footer>{html.escape(footer)}</footer></body></html>\n"
    )
