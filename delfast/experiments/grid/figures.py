"""The paper's figures 2 to 4: strategies by budget, and strategies by method. PNG files, drawn without a display."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from delfast.experiments.grid.summary import Mean, Row
from delfast.experiments.reports.plots import INK, save_figure

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color); lines differ in marker, dash and fill too, bars in hatch
STYLES = [
    (colour, marker, dash, fill, hatch)
    for dash, fill, hatch in (("-", "full", None), ("--", "none", "//"), ("-.", "left", ".."))
    for colour, marker in (
        *(("#E69F00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#D55E00", "P")),
        ("#000000", "X"),
    )
]
GAPS = {
    "delta_forget": "Δ forget accuracy",
    "delta_mia": "Δ membership inference",
    "delta_test": "Δ test accuracy",
}


def plot_budgets(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the gaps to the oracle by budget: a line for each strategy, with 95 % intervals. The oracle is at 0."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    budgets = sorted({100 * row["budget"] for row in rows})
    apart = min((more - less for less, more in itertools.pairwise(budgets)), default=1)
    figure, panels = _panels(title)
    for axes, (field, label) in zip(panels, GAPS.items(), strict=True):
        for position, strategy in enumerate(strategies):
            colour, marker, dash, fill, _ = STYLES[position % len(STYLES)]
            found = sorted((row for row in rows if row["strategy"] == strategy), key=lambda row: row["budget"])
            aside = 0.03 * apart * (position - (len(strategies) - 1) / 2)  # so that the error bars do not overlap
            axes.errorbar(
                [100 * row["budget"] + aside for row in found],
                [row[field].value for row in found],
                yerr=_bars([row[field] for row in found], least=-100),
                color=colour,
                marker=marker,
                linestyle=dash,
                fillstyle=fill,
                markersize=5,
                linewidth=1.2,
                capsize=2,
                label=strategy,
            )
        axes.set_title(label, fontsize=11)
        axes.set_xlabel("budget (percent of the parameters)")
    panels[0].set_ylabel("oracle - method (points)")
    _save(figure, panels, path)


def plot_methods(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw the sizes of the gaps to the oracle: a group of bars for each method, a bar for each of its strategies."""
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows = sorted(rows, key=lambda row: (methods.index(row["method"]), strategies.index(row["strategy"])))
    places = [place + 1.5 * methods.index(row["method"]) for place, row in enumerate(rows)]  # in widths of a bar
    figure, panels = _panels(title)
    for axes, (field, label) in zip(panels, GAPS.items(), strict=True):
        for position, strategy in enumerate(strategies):
            colour, *_, hatch = STYLES[position % len(STYLES)]
            found = [
                (place, row[field]) for place, row in zip(places, rows, strict=True) if row["strategy"] == strategy
            ]
            sizes = [replace(mean, value=abs(mean.value)) for _, mean in found]
            axes.bar(
                [place for place, _ in found],
                [size.value for size in sizes],
                0.94,
                yerr=_bars(sizes, least=0),
                error_kw={"linewidth": 0.8, "capsize": 1.5, "ecolor": INK},
                color=colour,
                hatch=hatch,
                label=strategy,
            )
        groups = [[place for place, row in zip(places, rows, strict=True) if row["method"] == name] for name in methods]
        middles = [sum(group) / len(group) for group in groups]
        axes.set_title(f"|{label}|", fontsize=11)
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # keeps the oracle's line above the axis
        axes.set_xticks(middles, methods, rotation=30, ha="right", fontsize=8)
        axes.set_xlabel("method")
    panels[0].set_ylabel("size of oracle - method (points)")
    _save(figure, panels, path)


def _panels(title: str) -> tuple[Figure, Any]:
    """A figure with axes for each gap, and the oracle's line at 0."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(GAPS))
    for axes in panels:
        axes.axhline(0, color=INK, linestyle=":", linewidth=1.4, label="oracle")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Figure, panels: Any, path: Path) -> None:
    """Write the figure with one legend for all panels."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    save_figure(figure, path)


def _bars(means: Sequence[Mean], least: float) -> list[list[float]]:
    """Lengths of the intervals below and above the means, cut at ``least`` and at 100, beyond which no gap can lie.

    The NaN of a single seed is not drawn.
    """
    below = [np.minimum(mean.half, mean.value - least) for mean in means]
    return [below, [np.minimum(mean.half, 100 - mean.value) for mean in means]]
