"""The results of a grid as rows, one for each network and cell, and means over seeds with 95 % intervals."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delfast.evaluation import gaps, relative_time
from delfast.experiments.grid.cells import ATTACKS, RESULT, attacks_on, metrics_of
from delfast.experiments.grid.definition import EVERYTHING, ORACLE, ORIGINAL, Grid
from delfast.experiments.grid.records import read_network

Row = dict[str, Any]
KEYS = ("setting", "method", "strategy", "budget")
MEASURES = (
    *("forget_acc", "retain_acc", "test_acc", "mia", "delta_forget", "delta_mia", "delta_test"),
    *("forget_loss", "retain_loss", "test_loss", "kl_forget", "kl_test", "changeable", "changed"),
    *("seconds", "relative_time"),
)
MEMBERSHIP = (*ATTACKS, "u_lira")
ANYTIME = ("anytime_examples", "anytime_of", "anytime_overlap", "anytime_overlap_of_all")
STAGES = ("localize", "prepare", "finetune", "train")
SETTINGS = ("of", "epochs", "lr", "batch_size", "device", "forget", "forget_ratio")
PROVENANCE = ("delfast", "torch", "commit", "platform", "kernels", "threads")
COLUMNS = (
    *(*KEYS, "seed", *SETTINGS, *MEASURES, *MEMBERSHIP),
    *(f"seconds_{stage}" for stage in STAGES),
    *PROVENANCE,
)


@dataclass(frozen=True)
class Mean:
    """Mean over seeds; ``half``: half the width of its 95 % interval (Student's t), NaN for one seed."""

    value: float
    half: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.half) else f"{self.value:.2f} ± {self.half:.2f}"

    @property
    def signed(self) -> str:
        """The text with a sign, for differences."""
        return f"{'+' if self.value >= 0 else ''}{self}"


def mean(values: Sequence[float]) -> Mean:
    """The mean, with Student's t of n - 1 degrees of freedom times the standard error (Student 1908)."""
    from scipy.stats import t

    count = len(values)
    middle = sum(values) / count
    if count == 1:
        return Mean(middle, math.nan, 1)
    error = math.sqrt(sum((value - middle) * (value - middle) for value in values) / (count - 1) / count)
    return Mean(middle, float(t.ppf(0.975, count - 1)) * error, count)


def rows_of(grid: Grid, results: Iterable[Mapping[str, Any]], directory: Path) -> list[Row]:
    """A row for every network (method "original" or "oracle") and every cell that did not fail: ``COLUMNS``.

    ``of``: the method of a variant. ``budget``: a fraction of the parameters. ``forget_ratio``: the fraction of the
    training set to forget. Measures are percentages, losses and divergences nats; Δ = oracle - method. ``changeable``,
    ``changed``: percent of the parameters that may change, and that did. SalUn's attacks have a column each.
    ``relative_time``: relative to retraining, where the same device, threads and torch did both. ``PROVENANCE``: the
    versions and the machine. ``commit`` is empty where delfast did not run from a clone; ``kernels`` is the instruction
    set of the CPU, or the build for CUDA and its GPU. A cell whose localization stops when it is stable also has the
    columns of ``ANYTIME``; see ``_anytime`` of the cells.
    """
    rows = []
    for network in grid.trained:
        if network.shadow:
            continue
        other = replace(network, which=ORACLE)
        summary, retraining = read_network(directory, network), read_network(directory, other)
        metrics = metrics_of(directory, network)
        rows.append(
            {
                "setting": network.setting,
                "method": network.which,
                "strategy": EVERYTHING,
                "budget": None,
                "seed": network.config.seed,
                "of": network.which,
                **{key: getattr(network.config, key) for key in ("epochs", "lr", "batch_size")},
                "device": summary["provenance"]["device"],
                **_forget(summary),
                "changeable": 100.0,
                **metrics.as_dict(),
                **gaps(metrics, metrics_of(directory, other)),
                **attacks_on(directory, network),
                **_times(summary, retraining),
                **_provenance(summary),
            }
        )
    for cell, result in zip(grid.cells, results, strict=True):
        if "failed" in result:
            continue
        retraining = read_network(directory, cell.oracle())
        rows.append(
            {
                "setting": cell.setting,
                "method": cell.label,
                "strategy": cell.strategy,
                "budget": cell.budget,
                "seed": cell.config.seed,
                "of": cell.method.name,
                **{key: getattr(cell.method, key, None) for key in ("epochs", "lr")},
                "batch_size": cell.batch_size,
                "device": result["provenance"]["device"],
                **_forget(retraining),
                **{name: result["metrics"][name] for name in RESULT["metrics"]},
                **{name: result["attacks"][name] for name in RESULT["attacks"]},
                **({"u_lira": result["u_lira"]} if "u_lira" in result else {}),
                **{f"anytime_{name}": value for name, value in result.get("anytime", {}).items() if value is not None},
                "changed": 100 * result["changed"],
                "changeable": 100 * result["mask"]["fraction"],
                **_times(result, retraining),
                **_provenance(result),
            }
        )
    return rows


def _forget(summary: Mapping[str, Any]) -> Row:
    """The columns of the forget set, from the summary of a network."""
    forget = summary["forget"]
    return {"forget": forget["spec"], "forget_ratio": forget["examples"] / forget["of"]}


def _times(result: Mapping[str, Any], retraining: Mapping[str, Any]) -> Row:
    seconds = result["seconds"]
    row = {"seconds": sum(seconds.values())} | {f"seconds_{name}": seconds[name] for name in STAGES if name in seconds}
    if _machine(result) == _machine(retraining):
        row["relative_time"] = relative_time(row["seconds"], sum(retraining["seconds"].values()))
    return row


def _provenance(result: Mapping[str, Any]) -> Row:
    """The columns of ``PROVENANCE``."""
    origin, backend = result["provenance"], result["provenance"]["backend"]
    kernels = backend["isa"] if origin["device"] == "cpu" else backend["cuda"]
    row = {name: origin.get(name) for name in ("delfast", "torch", "commit", "platform")}
    return {**row, "kernels": kernels, "threads": backend["threads"]}


def _machine(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """The device, versions and threads that determine the seconds of a result."""
    row = _provenance(result)
    return result["provenance"]["device"], *(row[name] for name in ("platform", "torch", "threads", "kernels"))


def origins(results: Iterable[Mapping[str, Any]]) -> str:
    """The versions and machines that computed the cells, with the number of cells of each."""
    counts = Counter(
        "delfast {delfast}, torch {torch}, {platform}, {device}, threads: {threads}".format(**result["provenance"])
        for result in results
        if "failed" not in result
    )
    return "; ".join(f"{origin} ({count})" if len(counts) > 1 else origin for origin, count in counts.items())


def to_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV; a column that a row lacks is empty. The columns of ``ANYTIME`` are there if a row has one."""
    rows, stream = list(rows), io.StringIO()
    columns = [*COLUMNS, *(name for name in ANYTIME if any(name in row for row in rows))]
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
    return stream.getvalue()


def means(rows: Iterable[Row]) -> list[Row]:
    """One row for all seeds of a (setting, method, strategy, budget), with measures as ``Mean``."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    found = []
    for group in groups.values():
        first = {key: group[0][key] for key in (*KEYS, "forget", "forget_ratio")}
        names = [*MEASURES, *MEMBERSHIP, *ANYTIME, *(f"seconds_{stage}" for stage in STAGES)]
        found.append(
            first | {name: mean([row[name] for row in group]) for name in names if all(name in row for row in group)}
        )
    return found


__all__ = ["COLUMNS", "KEYS", "ORIGINAL", "STAGES", "Mean", "Row", "mean", "means", "origins", "rows_of", "to_csv"]
