"""Writes the README's tables from the results kept in benchmarks/results, so that no number in them is typed.

python -m benchmarks.readme           rewrites README.md
python -m benchmarks.readme --check   writes nothing; exit code 1 if README.md differs. Either: 2 for bad results
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import COLUMNS, row
from delfast.cli.compare.grid import EVERYTHING
from delfast.cli.compare.report import FIELDS
from delfast.cli.compare.summary import KEYS, means
from delfast.errors import InputError
from delfast.files import read_json, write_text
from delfast.report import METHOD_COLUMNS, markdown_table, method_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CPU = ROOT / "benchmarks/results/cpu.json"  # of `make bench`: kernels
STEPS = ROOT / "benchmarks/results/steps.json"  # of `make bench`: training steps
JOB = ROOT / "benchmarks/results/job.json"  # of `make bench`: whole jobs
MEMORY = ROOT / "benchmarks/results/memory.json"  # of `make bench`: memory of the finetune
GPU = ROOT / "benchmarks/results/gpu.json"  # of `python -m benchmarks.gpu`
DEMO = ROOT / "benchmarks/results/demo.json"  # the summary.json of `make demo`, kept
CIFAR10 = ROOT / "experiments/results/cifar10-small/results.csv"  # of `delfast compare`, kept
SECTORS = ROOT / "benchmarks/results/sectors.md"  # what build/kernels/tests/release/cuda/test_sectors prints

BUDGET = 0.3  # of the table of CIFAR-10
ALIGNMENTS = ("aligned", "shifted", "apart")  # its words for how parameters and gradients lie in memory


def measured(results: dict[str, Any], source: str) -> str:
    """pytest-benchmark's JSON as a table, cases of one test with one target in a row, and the machine's line."""
    rows: dict[tuple[str, str], list[str]] = {}
    if not results["benchmarks"]:
        raise InputError(f"'{source}' holds no benchmark; run `make bench` again")
    usual = Counter(benchmark["extra_info"].get("isa") for benchmark in results["benchmarks"]).most_common(1)[0][0]
    for benchmark in results["benchmarks"]:
        name, extra = benchmark["name"], benchmark["extra_info"]
        if "measured" not in extra:
            raise InputError(f"'{source}' has no figure for {name}, which failed; run `make bench` again")
        test = name.partition("[")[0].removeprefix("test_").replace("_", " ")
        values = [value for value in (benchmark["params"] or {}).values() if isinstance(value, str)]
        parameters = [value for value in values if value not in extra["target"]]
        case = ", ".join(parameters if extra["isa"] in (usual, *parameters) else [*parameters, extra["isa"]])
        rows.setdefault((test, extra["target"]), []).append(
            f"{case}: {extra['measured']}" if case else extra["measured"]
        )
    machine, commit = results["machine_info"], results["commit_info"]
    where = f"{machine['cpu']['brand_raw']} ({machine['machine']}), {machine['cpu']['count']} CPUs"
    version = f"commit {commit['id'][:7]}{' with changes' if commit['dirty'] else ''}"
    threads = "/".join(sorted({str(benchmark["extra_info"]["threads"]) for benchmark in results["benchmarks"]}))
    head = f"{where}, {threads} threads, {usual} where nothing else is said; "
    head += f"Python {machine['python_version']}; {version}."
    lines = [f"| {test} | {'<br>'.join(cases)} | {target} |" for (test, target), cases in rows.items()]
    return "\n".join([head, "", "| benchmark | measured | target |", "|---|---|---|", *lines, ""])


def gpu(results: dict[str, Any]) -> str:
    """The card's line, and a row for each kernel on each network."""
    if not results["results"] or results["failures"]:
        raise InputError(f"'{GPU.name}' is of a run that failed; run `python -m benchmarks.gpu` again")
    made = results["provenance"]
    head = f"{results['device']}, copy {results['copy_gb_per_s']:.0f} GB/s; torch {made['torch']}, CUDA {made['cuda']}."
    return "\n".join([head, "", markdown_table(COLUMNS, [row(result) for result in results["results"]])])


def demo(summary: dict[str, Any]) -> str:
    """Both scenarios of the demo's summary in one table; then a line on each, and on what it was made with."""
    if summary["quick"]:
        raise InputError(f"'{DEMO.name}' is of `delfast demo --quick`; keep the summary.json of `make demo` there")
    rows, lines = [], []
    for name, scenario in summary["scenarios"].items():
        forget, mask, methods = scenario["forget"], scenario["mask"], scenario["methods"]
        rows += method_rows({f"{name}, {method}": values for method, values in methods.items()})
        line = f"- {name}: forget {forget['examples']} of {forget['of']} images; mask of {mask['selected']:,} of "
        line += f"{mask['total']:,} parameters, {mask['bytes']:,} bytes"
        before, after = (abs(methods[method]["delta_forget"]) for method in ("original", "del"))
        lines.append(line + (f"; DEL closes {100 * (1 - after / before):.0f} % of Δ forget" if before else ""))
    made, backend = summary["provenance"], summary["backend"]["backend"]
    lines.append(f"- torch {made['torch']}, Python {made['python']}, backend {backend}, seed {made['seed']}\n")
    return "\n".join([markdown_table(METHOD_COLUMNS, rows), *lines])


def sectors(report: str) -> str:
    """The report's ratios of whole families: the largest of each kind of kernel, by how memory is aligned."""
    ratios: dict[str, str] = {}  # by what was run, the selection's passes apart; a family's sum comes last
    for what, kernel, ratio in re.findall(r"^\| ([\w ,]+) \| `([\w*]+)` \|.*\| ([\d.]+) \|$", report, re.MULTILINE):
        ratios[f"{what}, {kernel}" if kernel.startswith("selection") else what] = ratio
    kinds = {
        "criticality": lambda what: "," not in what,
        "selection, of its passes": lambda what: "selection" in what,
        "masked updates by rows": lambda what: what.endswith("rows"),
        "masked updates by elements": lambda what: what.endswith("elements"),
    }
    rows = []
    for kind, belongs in kinds.items():
        found = [
            [float(ratio) for what, ratio in ratios.items() if what.partition(",")[0] == alignment and belongs(what)]
            for alignment in ALIGNMENTS
        ]
        if not all(found):
            raise InputError(f"'{SECTORS.name}' has no figure for {kind}; make it again as it says")
        rows.append([kind, *(f"{max(some):.2f}" for some in found)])
    return markdown_table(("sectors asked for / least", *ALIGNMENTS), rows)


def cifar10(text: str) -> str:
    """The kept results: for each setting the original, the oracle, every method without a mask, and reset and finetune
    of every strategy at the one budget.
    """
    every = csv.DictReader(io.StringIO(text))
    rows = [row for row in every if row["strategy"] == EVERYTHING or row["of"] == "del"]
    if not rows:
        raise InputError(f"'{CIFAR10.name}' holds no results; run the grid as experiments/results says")
    found = means({name: _number(value) for name, value in row.items() if value or name in KEYS} for row in rows)
    fields = ("forget_acc", "test_acc", "mia", "delta_forget", "delta_mia", "delta_test")
    columns = ("setting", "method", "strategy", "seeds", *(FIELDS[field] for field in fields))
    cells = [
        [row["setting"], row["method"], row["strategy"], str(row["mia"].seeds), *(str(row[field]) for field in fields)]
        for row in found
        if row["budget"] in ("", BUDGET)
    ]
    return markdown_table(columns, cells)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def fill(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced; InputError unless they are there once."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, times = re.subn(pattern, lambda found: f"{found[1]}{content}{found[2]}", text, flags=re.DOTALL)
    if times != 1:
        raise InputError(f"expected one pair of markers '<!-- {name} -->' in '{README.name}', got {times}; put it back")
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description="Write the README's tables.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README differs")
    check = parser.parse_args(arguments).check
    try:
        before = README.read_text(encoding="utf-8")
        after = fill(before, "measured", measured(read_json(CPU), CPU.name))
        after = fill(after, "steps", measured(read_json(STEPS), STEPS.name))
        after = fill(after, "job", measured(read_json(JOB), JOB.name))
        after = fill(after, "memory", measured(read_json(MEMORY), MEMORY.name))
        after = fill(after, "gpu", gpu(read_json(GPU)))
        after = fill(after, "sectors", sectors(SECTORS.read_text(encoding="utf-8")))
        after = fill(after, "demo", demo(read_json(DEMO)))
        after = fill(after, "cifar10", cifar10(CIFAR10.read_text(encoding="utf-8")))
    except (InputError, OSError) as error:
        print(f"readme: error: {error}", file=sys.stderr)
        return 2
    if not check:
        write_text(README, after)
    elif before != after:
        print("readme: README.md differs from benchmarks/results; run `python -m benchmarks.readme`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
