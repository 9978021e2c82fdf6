"""``delfast bench``: the time of each stage of an unlearning job, for each backend and precision."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from delfast.experiments.reports.plots import save_figure
from delfast.experiments.stages import Request, as_arguments
from delfast.files import make_output_dir, write_json
from delfast.ops import BACKEND
from delfast.provenance import provenance

log = logging.getLogger("delfast")

SUMMARY, PLOT = "summary.json", "stages.png"
STEP = ("load", "forward", "backward", "compact weight gradient", "step")  # of finetuning, within the mask
STAGES = ("load", "forward", "backward", "weight gradient", "compact weight gradient", "step", "score", "select",
          "reset", "evaluate")  # fmt: skip
COLOURS = ("#CC79A7", "#56B4E9", "#0072B2", "#E69F00", "#009E73")  # Okabe & Ito's, distinct with any colour vision


def profile(request: Request, output_dir: Path) -> dict[str, dict[str, float]]:
    """Time every variant, one after the other, and write summary.json and stages.png.

    Returns variant -> stage -> median seconds of a batch. Raises RuntimeError with the last line of standard error of a
    variant's process that fails.
    """
    make_output_dir(output_dir)
    backends = ["native", "torch"] if BACKEND.name == "native" else ["torch"]
    found = {}
    for precision in ("fp32", "bf16"):
        for backend in backends:
            name = f"{precision}, {backend}"
            log.info(f"bench: {name}")
            found[name] = _in_its_own_process(replace(request, precision=precision), backend)
    content = {"command": "bench", "options": asdict(request), "seconds": found}
    write_json(output_dir / SUMMARY, {**content, "provenance": provenance(threads=request.threads)})
    _plot(found, output_dir / PLOT, f"one step of {request.model}, {request.batch_size} examples")
    return found


def rows(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row for each stage, in milliseconds, and one for a whole step of finetuning."""
    table = [[stage, *(f"{1e3 * seconds[stage]:.2f}" for seconds in found.values())] for stage in STAGES]
    whole = ["a step within the mask", *(f"{1e3 * sum(s[stage] for stage in STEP):.2f}" for s in found.values())]
    return [*table, whole]


def _in_its_own_process(request: Request, backend: str) -> dict[str, float]:
    environment = {**os.environ, "DELFAST_BACKEND": backend, "OMP_NUM_THREADS": str(request.threads)}
    command = [sys.executable, *as_arguments(request)]
    theirs, ours = os.pipe()  # nothing is sent: the closing of our end ends the process
    try:
        result = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment)
    finally:
        os.close(theirs)
        os.close(ours)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise RuntimeError(f"the stages cannot be timed: {lines[-1]}")
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measured


def _plot(found: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Draw a stacked bar for each variant, of the parts of a step."""
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    begun = [0.0] * len(found)
    for stage, colour in zip(STEP, COLOURS, strict=True):
        lengths = [1e3 * seconds[stage] for seconds in found.values()]
        axes.barh(list(found), lengths, left=begun, color=colour, label=stage, edgecolor="white", linewidth=0.8)
        begun = [left + length for left, length in zip(begun, lengths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STEP), frameon=False)
    save_figure(figure, path)
