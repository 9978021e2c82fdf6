"""Plots as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delfast.extras import extra
from delfast.files import write_atomically
from delfast.mask import LayerRow

with extra("delfast.experiments.reports.plots"):
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinct with any colour vision (https://jfly.uni-koeln.de/color)
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7")
INK = "#444444"
_MEASURES = {
    "forget_acc": "forget accuracy",
    "retain_acc": "retain accuracy",
    "test_acc": "test accuracy",
    "mia": "membership inference:\nforget set called non-member",
}


def plot_accuracies(methods: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw bars of accuracies and MIA for each method, and the oracle's level across each group.

    methods: name -> percentages ``forget_acc, retain_acc, test_acc, mia``; one of the names is "oracle".
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(methods)
    for position, (name, values) in enumerate(methods.items()):
        offset = (position - (len(methods) - 1) / 2) * width
        bars = axes.bar(
            [group + offset for group in range(len(_MEASURES))],
            [values[field] for field in _MEASURES],
            width * 0.94,
            label=name,
            color=COLOURS[position % len(COLOURS)],
        )
        # on white, so that the oracle's line does not cross the numbers
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=3, bbox={"color": "white", "pad": 0.5})
    for group, field in enumerate(_MEASURES):
        label = "_" if group else "oracle's level"  # matplotlib leaves labels that begin with "_" out of the legend
        level = methods["oracle"][field]
        axes.hlines(level, group - 0.45, group + 0.45, colors=INK, linestyles="--", linewidth=1.2, label=label)
    axes.set_xticks(range(len(_MEASURES)), list(_MEASURES.values()))
    axes.set_ylabel("percent")
    axes.set_ylim(0, 112)  # room for the numbers above bars of 100
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(methods) + 1, frameon=False)
    save_figure(figure, path)


def plot_selection(rows: Sequence[LayerRow], path: Path, title: str) -> None:
    """Draw the fraction of selected channels of each parameter that has channels (ndim > 1), in the model's order."""
    layers = [row for row in rows if row.channel_count]
    figure = Figure(figsize=(9, max(3.0, 1.2 + 0.24 * len(layers))), layout="constrained")
    axes = figure.add_subplot()
    fractions = [100 * row.channels / row.channel_count for row in layers]
    bars = axes.barh(range(len(layers)), fractions, color=COLOURS[1])
    axes.bar_label(bars, [f"{row.channels} of {row.channel_count}" for row in layers], fontsize=8, padding=3)
    axes.set_yticks(range(len(layers)), [row.name for row in layers], fontsize=8)
    axes.invert_yaxis()  # the input side on top
    axes.set_xlim(0, max([*fractions, 1.0]) * 1.15)
    axes.set_xlabel("channels selected (percent of the parameter's)")
    axes.set_ylabel("parameter")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
