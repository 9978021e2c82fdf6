"""Drawings of a ledger's report, as SVG inside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from delfast.experiments.reports.pages import anchor, inline_svg
from delfast.experiments.reports.plots import COLOURS, INK
from delfast.ledger.report.history import Run
from delfast.ledger.requests import ACCEPTED

SIZE = (4.6, 3.0)  # inches: two panels side by side at 1280 pixels, one at 390; text of 9 points is legible in both
NAMED = 4  # lines of single forget sets that get a colour and a name; more cannot be distinguished
Interval = Mapping[str, float | None]


def draw_erosion(runs: Sequence[Run]) -> Markup:
    """Draw the accuracy on the retain set and the test set after each run."""
    figure, axes = _panel("run", "accuracy (percent)")
    for position, (name, label) in enumerate((("retain", "retain set"), ("test", "test set"))):
        found = [(run, _measure(run, name, "accuracy")) for run in runs]
        _points(axes, found, COLOURS[position], "os"[position], label)
    return _finish(figure, axes, "erosion", "Accuracy on the retain set and the test set after each run")


def draw_reversal(
    runs: Sequence[Run], worst: Sequence[str], returns: Mapping[str, Sequence[tuple[int, float]]]
) -> Markup:
    """Draw the accuracy on every forget set from its own run on; the sets of ``worst`` have a colour and a name."""
    figure, axes = _panel("run", "accuracy (percent)")
    others = [name for name in returns if name not in worst]
    for name in others:
        label = "other forget sets" if name == others[0] else None
        axes.plot(*zip(*returns[name], strict=True), color="#b5b5b5", linewidth=0.9, marker=".", label=label)
    for position, name in enumerate(worst):
        style = {"color": COLOURS[position], "marker": "os^D"[position], "markersize": 4.5, "linewidth": 1.3}
        axes.plot(*zip(*returns[name], strict=True), label=name, **style)
    control = [(run.number, _measure(run, "control", "accuracy")) for run in runs if run.status == ACCEPTED]
    known = [(number, interval["value"]) for number, interval in control if interval is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=INK, linestyle=":", label="never-seen examples")
    return _finish(figure, axes, "reversal", "Accuracy on each forget set, from its own run on")


def draw_attack(runs: Sequence[Run]) -> Markup:
    """Draw the attack advantage on each run's own forget set, the largest on all forget sets, and its limit."""
    figure, axes = _panel("run", "attack advantage")
    _points(axes, [(run, run.largest_attack) for run in runs], COLOURS[0], "s", "largest of all forget sets")
    _points(axes, [(run, _measure(run, "forget", "attack_advantage")) for run in runs], COLOURS[1], "o", "forget set")
    _limit(axes, runs, "attack_advantage")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return _finish(figure, axes, "attack", "Attack advantage on each run's own forget set, and the largest on all")


def draw_ratios(runs: Sequence[Run]) -> Markup:
    """Draw the relearning ratio of each run, and its limit."""
    figure, axes = _panel("run", "relearning ratio")
    _points(axes, [(run, (run.figures or {}).get("relearn_ratio")) for run in runs], COLOURS[2], "o", "forget set")
    axes.axhline(1, color=INK, linestyle=":", label="like never-seen examples")
    _limit(axes, runs, "relearn_ratio")
    return _finish(figure, axes, "ratios", "Relearning ratio of each run")


def draw_relearning(run: Run, name: str, curves: Mapping[str, Any]) -> Markup:
    """Draw the accuracy regained in finetuning on one set: the model beside networks that never saw the examples."""
    figure, axes = _panel("step of finetuning", "accuracy (percent)")
    for position, control in enumerate(curves["control"]):
        label = "never saw the examples" if position == 0 else None
        axes.plot(curves["steps"], control, color=COLOURS[0], linestyle="--", linewidth=1.1, label=label)
    axes.plot(curves["steps"], curves["accuracy"], color=COLOURS[1], linewidth=1.8, marker="o", label="the model")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))  # an axis of equal values would go beyond 100 percent
    label = f"Relearning on {name}: accuracy on the forget set by step"
    return _finish(figure, axes, f"run{run.number}-{name}", label)


def _measure(run: Run, name: str, field: str) -> Interval | None:
    """Return a figure of one set of a run's audit; None if it was not measured."""
    found: Interval | None = ((run.figures or {}).get("sets", {}).get(name) or {}).get(field)
    return found


def _panel(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE)  # fixed margins: a layout engine takes as long as the drawing
    figure.subplots_adjust(left=0.14, right=0.98, top=0.97, bottom=0.36)
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _points(axes: Any, found: Sequence[tuple[Run, Interval | None]], colour: str, marker: str, label: str) -> None:
    """Draw intervals by run: full and joined where the run was accepted, hollow elsewhere."""
    known = [(run, interval) for run, interval in found if interval is not None]
    for accepted in (True, False):
        chosen = [(run.number, interval) for run, interval in known if (run.status == ACCEPTED) == accepted]
        if not chosen:
            continue
        values = [interval["value"] for _, interval in chosen]
        bars = [[_length(interval, end) for _, interval in chosen] for end in ("low", "high")]
        axes.errorbar(
            [number for number, _ in chosen],
            values,
            yerr=bars,
            color=colour,
            marker=marker,
            markersize=5,
            fillstyle="full" if accepted else "none",
            linestyle="-" if accepted else "none",
            linewidth=1.3,
            elinewidth=1,
            capsize=2,
            label=label if accepted else f"{label}, not accepted",
        )


def _length(interval: Interval, end: str) -> float:
    """Return the length of an interval on one side; NaN, which is not drawn, where there is no interval."""
    value, limit = interval["value"], interval[end]
    assert value is not None  # only the ends can be missing
    return math.nan if limit is None else abs(limit - value)


def _limit(axes: Any, runs: Sequence[Run], name: str) -> None:
    """Draw a threshold's limit by run: it may change between runs."""
    limits = [(run.number, check.limit) for run in runs for check in run.checks if check.name == name]
    known = [(number, limit) for number, limit in limits if limit is not None]
    if known:
        axes.step(*zip(*known, strict=True), where="mid", color="#a11212", linestyle="--", linewidth=1.1, label="limit")
        if len(known) == 1:  # a step through one point is no line
            axes.axhline(known[0][1], color="#a11212", linestyle="--", linewidth=1.1)


def _finish(figure: Figure, axes: Any, name: str, label: str) -> Markup:
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, fontsize=8.5)
    return inline_svg(figure, anchor(name), label)
