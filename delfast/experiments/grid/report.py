"""The report of a grid: the answer first, then the paper's tables and figures, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from delfast.experiments.grid import answer
from delfast.experiments.grid.answer import Standing, standings
from delfast.experiments.grid.definition import Grid
from delfast.experiments.grid.figures import plot_answer
from delfast.experiments.grid.sections import Section, failures, hyperparameters, sections_of, sizes_of
from delfast.experiments.grid.summary import Row, means
from delfast.experiments.reports.pages import anchor, inline_svg, render
from delfast.experiments.reports.plots import save_figure
from delfast.files import make_output_dir

FIGURES = "figures"  # the folder of the plots
MEANING = """Percentages, mean ± half of the 95 % interval over seeds (Student's t). The number of seeds differs from
row to row. Δ = oracle - method: the nearer to 0, the better. MIA: percent of the forget set that membership inference
calls non-member. KL: divergence of the method's predictions from the oracle's, in nats. Changed: percent of the
parameters that differ from the original's. RTE: run time relative to retraining, localization included. RTE is empty
where, for one of the seeds, the oracle was trained with another device, platform, torch, number of threads or kernels
(the CPU's instruction set, or the build for CUDA and its GPU). Seconds are wall-clock times and include the effect of
other work on the machine."""


@dataclass(frozen=True)
class Answer:
    """The answer for one setting: three paragraphs, a plot, and a table of the methods."""

    setting: str
    forget: str
    ranked: list[Standing]
    figure: Figure | None

    @property
    def sentences(self) -> list[str]:
        """The paragraphs, or one that there is no result."""
        return answer.sentences(self.ranked) or ["No method has a result at the grid's budget yet."]

    @property
    def name(self) -> str:
        """The method that came nearest, with which the first paragraph begins; "" if there is no result."""
        return answer.name(self.ranked)

    @property
    def short(self) -> str:
        """The method that came nearest, in a few words."""
        return answer.short(self.ranked)

    @property
    def rows(self) -> list[list[str]]:
        """The table's rows, numbered as the points of the plot are."""
        return [[f"{place}. {cells[0]}", *cells[1:]] for place, cells in enumerate(self._cells(), 1)]

    @property
    def best(self) -> list[int]:
        """The positions of the nearest and of the methods in a tie with it."""
        return [place for place, standing in enumerate(self.ranked) if standing.is_best]

    @property
    def file(self) -> str:
        """The name of the plot's file."""
        return f"{self.setting}-answer.png"

    def _cells(self) -> list[list[str]]:
        return [standing.cells() for standing in self.ranked]


@dataclass(frozen=True)
class Folded:
    """A section as the page shows it: its drawing inside the page, its table as text, and the table as a CSV link."""

    section: Section
    svg: Markup | None
    csv: str


def make_report(
    grid: Grid, rows: Sequence[Row], failed: Sequence[Mapping[str, Any]], directory: Path, footer: str
) -> tuple[str, str, list[Path]]:
    """Return Markdown and HTML with the answer for each setting and every table and figure that the rows allow.

    Figures are written to ``directory``/figures; their paths are returned too. Names are shown as text, whatever they
    hold.
    """
    averaged = means(rows)
    answers = [_answer(setting, rows, grid) for setting in dict.fromkeys(row["setting"] for row in averaged)]
    sections: list[Section] = []
    for found in answers:
        sections += sections_of(found.setting, [row for row in averaged if row["setting"] == found.setting], grid)
    sections += [*sizes_of(averaged, grid.budget), hyperparameters(grid)]
    if failed:
        sections.append(failures(failed))
    paths = _save([*answers, *sections], directory / FIGURES)
    values = {
        "title": grid.title,
        "answers": answers,
        "columns": answer.COLUMNS,
        "reading": _one_line(answer.READING),
        "meaning": _one_line(MEANING),
        "figures": FIGURES,
        "footer": footer,
    }
    package = "delfast.experiments.grid"
    markdown = render(package, "grid.md", sections=sections, **values)
    drawings = [_svg(each.figure, each.file, f"{each.setting}: gaps to the oracle by method") for each in answers]
    page = render(package, "grid.html", folded=list(map(_fold, sections)), drawings=drawings, **values)
    return markdown, page, paths


def _answer(setting: str, rows: Sequence[Row], grid: Grid) -> Answer:
    found = [row for row in rows if row["setting"] == setting]
    share = f"{100 * found[0]['forget_ratio']:g} % of the training set"
    ranked = standings(found, grid.budget)
    figure = plot_answer(ranked) if sum(not standing.is_original for standing in ranked) > 1 else None
    return Answer(setting, f"Forget set {found[0]['forget']}, {share}.", ranked, figure)


def _save(parts: Sequence[Answer | Section], directory: Path) -> list[Path]:
    """Write the figures of parts as PNG files, and return their paths."""
    make_output_dir(directory)
    paths = []
    for part in parts:
        if part.figure is not None:
            paths.append(directory / part.file)
            save_figure(part.figure, paths[-1])
    return paths


def _fold(section: Section) -> Folded:
    content = base64.b64encode(section.to_csv().encode()).decode()
    return Folded(section, _svg(section.figure, section.file, section.title), f"data:text/csv;base64,{content}")


def _svg(figure: Figure | None, file: str, label: str) -> Markup | None:
    return None if figure is None else inline_svg(figure, anchor(file.removesuffix(".png")), label)


def _one_line(text: str) -> str:
    return " ".join(text.split())
