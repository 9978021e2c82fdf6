"""Figures of a grid's report: the answer, and the paper's figures 2 to 4. Drawn without a display."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Affine2D

from delfast.experiments.grid.answer import ONE_SEED, Standing, cost
from delfast.experiments.grid.summary import Mean, Row
from delfast.experiments.reports.plots import COLOURS, INK

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


AREAS = (25.0, 260.0)  # square points of a marker: of no time, and of the longest time in the figure
HALO = [withStroke(linewidth=2.5, foreground="white")]  # intervals may cross a label
NEAR = 10.0  # points between two markers below which they share a label
DISTANCES = (6, 10, 16, 24, 34, 46, 60, 80, 100, 130)  # points from a marker's centre to its label, tried in this order
LED = 14.0  # points between a marker's centre and its label from which a line joins them


def plot_answer(ranked: Sequence[Standing]) -> Figure:
    """Draw the gap in forgetting against the gap in test accuracy: a numbered point for each method, the oracle at 0.

    The area of a point grows with the method's time. Methods whose points are close share a label.
    """
    figure = Figure(figsize=(5.4, 4.4))
    figure.subplots_adjust(left=0.11, right=0.98, top=0.98, bottom=0.24)  # fixed, so that distances on paper are known
    axes = figure.add_subplot()
    longest = _longest(ranked)
    for name, (colour, marker, fill) in KINDS.items():
        chosen = [each for each in ranked if _kind(each) == name]
        if not chosen:
            continue
        across, up = [each.row["delta_test"] for each in chosen], [each.gap for each in chosen]
        axes.errorbar(
            [mean.value for mean in across],
            [mean.value for mean in up],
            xerr=_bars(across, least=-100),
            yerr=_bars(up, least=0),
            fmt="none",
            ecolor="#b5b5b5",
            elinewidth=1,
            zorder=1,
        )
        axes.scatter(
            [mean.value for mean in across],
            [mean.value for mean in up],
            s=[_area(cost(each), longest) for each in chosen],
            marker=marker,
            facecolors=colour if fill else "none",
            edgecolors=colour,
            linewidths=1.4,
            alpha=0.85,
            zorder=2,
        )
        axes.scatter([], [], s=45, marker=marker, facecolors=colour if fill else "none", edgecolors=colour, label=name)
    axes.scatter([0], [0], s=160, marker="*", color=INK, zorder=3, label="oracle")
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("oracle's test accuracy - the method's (points)")
    axes.set_ylabel("largest gap to the oracle (points)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)  # room for the labels of points at the top
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=9)
    _number(axes, ranked)
    return figure


KINDS = {  # colour, marker, whether it is filled
    "nearest, or a tie with it": (COLOURS[1], "o", True),
    "farther": (COLOURS[0], "s", True),
    "one seed": (COLOURS[2], "^", False),
    "not unlearned": ("#000000", "X", True),
}


def _kind(standing: Standing) -> str:
    """Return the name of the kind of point, in KINDS."""
    if standing.is_original:
        return "not unlearned"
    if standing.verdict == ONE_SEED or standing.gap.seeds < 2:
        return "one seed"
    return "nearest, or a tie with it" if standing.is_best else "farther"


def _longest(ranked: Sequence[Standing]) -> float:
    """Return the longest time of a method that was measured, or 0."""
    return max((cost(each) for each in ranked if math.isfinite(cost(each))), default=0.0)


def _area(time: float, longest: float) -> float:
    least, most = AREAS
    return least + (most - least) * time / longest if math.isfinite(time) and longest > 0 else least


def _number(axes: Any, ranked: Sequence[Standing]) -> None:
    """Write the methods' places beside their points; points that are close are joined and share one label."""
    axes.autoscale_view()  # settles the limits
    groups: list[tuple[list[int], Any]] = []
    centres = []
    for place, standing in enumerate(ranked, 1):
        point = (standing.row["delta_test"].value, standing.gap.value)
        centres.append(axes.transData.transform(point) * 72 / axes.figure.dpi)  # in points, as the sizes of text
        near = next((group for group in groups if np.linalg.norm(group[1] - centres[-1]) < NEAR), None)
        if near is None:
            groups.append(([place], centres[-1]))
        else:
            near[0].append(place)
    frame = axes.get_window_extent().transformed(Affine2D().scale(72 / axes.figure.dpi))
    radii = [math.sqrt(_area(cost(each), _longest(ranked))) / 2 for each in ranked]
    markers = [_Box(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    labels: list[_Box] = []
    for places, centre in groups:
        text = ", ".join(map(str, places))
        box = _place(centre, 5.6 * len(text) + 2, 10.0, frame, markers, labels)
        labels.append(box)
        point = axes.transData.inverted().transform(centre * axes.figure.dpi / 72)
        is_away = max(box.left - centre[0], centre[0] - box.right, box.low - centre[1], centre[1] - box.high) > LED
        axes.annotate(
            text,
            point,
            xytext=((box.left + box.right) / 2 - centre[0], (box.low + box.high) / 2 - centre[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            path_effects=HALO,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": INK, "shrinkA": 0} if is_away else None,
            zorder=4,
        )


@dataclass(frozen=True)
class _Box:
    """A rectangle on paper, in points."""

    left: float
    low: float
    right: float
    high: float

    def overlaps(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high


def _place(centre: Any, width: float, height: float, frame: Any, markers: list[_Box], labels: list[_Box]) -> _Box:
    """Return the box of a label: the nearest to its point, inside the axes, that overlaps no other label.

    Among these, one that covers no marker is preferred.
    """
    free: list[_Box] = []
    for distance, angle in itertools.product(DISTANCES, range(0, 360, 15)):
        x = centre[0] + (distance + width / 2) * math.cos(math.radians(angle + 15))
        y = centre[1] + (distance + height / 2) * math.sin(math.radians(angle + 15))
        box = _Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        inside = frame.x0 <= box.left and box.right <= frame.x1 and frame.y0 <= box.low and box.high <= frame.y1
        if inside and not any(map(box.overlaps, labels)):
            if not any(map(box.overlaps, markers)):
                return box
            free.append(box)
    x, y = centre
    return free[0] if free else _Box(x, y, x + width, y + height)  # more labels than the axes have room for


def plot_budgets(rows: Sequence[Row], title: str) -> Figure:
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
    return _with_legend(figure, panels)


def plot_methods(rows: Sequence[Row], title: str) -> Figure:
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
    return _with_legend(figure, panels)


def _panels(title: str) -> tuple[Figure, Any]:
    """A figure with axes for each gap, and the oracle's line at 0."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(GAPS))
    for axes in panels:
        axes.axhline(0, color=INK, linestyle=":", linewidth=1.4, label="oracle")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _with_legend(figure: Figure, panels: Any) -> Figure:
    """Add one legend for all panels."""
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def _bars(means: Sequence[Mean], least: float) -> list[list[float]]:
    """Lengths of the intervals below and above the means, cut at ``least`` and at 100, beyond which no gap can lie.

    The NaN of a single seed is not drawn.
    """
    below = [np.minimum(mean.half, mean.value - least) for mean in means]
    return [below, [np.minimum(mean.half, 100 - mean.value) for mean in means]]
