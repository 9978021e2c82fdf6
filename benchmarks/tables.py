"""Write the tables and the figure of the README and the docs from the kept results: no number in them is typed.

python -m benchmarks.tables           rewrites README.md, the tables of docs/ and docs/images/demo.png
python -m benchmarks.tables --check   writes nothing; exit code 1 if one of them differs. Either: 2 for bad results
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from benchmarks import gpu_bandwidth
from benchmarks.audit import RESULTS as AUDIT
from benchmarks.audit import table as audit_table
from benchmarks.distributed import RESULTS as DISTRIBUTED
from benchmarks.distributed import table as distributed_table
from benchmarks.gpu_kernels import COLUMNS, row
from benchmarks.gpu_report import (
    GOALS,
    KERNEL_GOALS,
    LEFT_OUT,
    RATIOS,
    SIDES,
    goal_rows,
    kernel_goal_rows,
    left_out_rows,
    ratio_rows,
    read_kept,
    side_rows,
)
from benchmarks.precision import RESULTS as PRECISION
from benchmarks.precision import table as precision_table
from benchmarks.thresholds import RESULTS as THRESHOLDS
from benchmarks.thresholds import table as thresholds_table
from delfast.errors import InputError
from delfast.experiments.grid.definition import EVERYTHING
from delfast.experiments.grid.summary import KEYS, means
from delfast.experiments.reports import FIELDS, markdown_table, method_table
from delfast.experiments.sequential import report as sequential
from delfast.files import read_json, write_text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "docs/results.md"
LANGUAGE_MODELS = ROOT / "docs/language_models.md"
LEDGER_PAGE = ROOT / "docs/ledger.md"
FIGURE = ROOT / "docs/images/demo.png"
CPU = ROOT / "benchmarks/results/cpu.json"  # of `make bench`: kernels
CALLS = ROOT / "benchmarks/results/calls.json"  # of `make bench`: calls of ops
CALLS_BEFORE = ROOT / "benchmarks/results/calls_before.json"  # the same, before torch's stable interface bound the ops
STEPS = ROOT / "benchmarks/results/steps.json"  # of `make bench`: training steps
JOB = ROOT / "benchmarks/results/job.json"  # of `make bench`: whole jobs
MEMORY = ROOT / "benchmarks/results/memory.json"  # of `make bench`: memory of the finetune
GPU = ROOT / "benchmarks/results/gpu.json"  # of `python -m benchmarks.gpu`
DEMO = ROOT / "benchmarks/results/demo.json"  # the summary.json of `make demo`, kept
CAUSAL_LM = ROOT / "benchmarks/results/causal_lm.json"  # of `python examples/causal_lm.py --json`
LEDGER = ROOT / "benchmarks/results/ledger.json"  # of `python -m benchmarks.ledger`
CIFAR10 = ROOT / "experiments/results/cifar10-small/results.csv"  # of `delfast compare`, kept
SEQUENTIAL = {  # of `delfast sequence`, packed
    name: ROOT / "experiments/results" / name for name in ("sequential-digits", "sequential-cifar10-small")
}
SECTORS = ROOT / "benchmarks/results/sectors.md"  # what build/kernels/tests/release/cuda/test_sectors prints

DRAWING = 3  # increase it when ``draw`` gives another picture: the kept figure is drawn again then
TITLES = {  # of the panels of the figure, with the number of images
    "mislabelled": "{} images with wrong labels",
    "non-iid": "{} images of two classes",
}
BUDGET = 0.3  # of the table of CIFAR-10
ALIGNMENTS = ("aligned", "shifted", "apart")  # its words for how parameters and gradients lie in memory


def speed(results: dict[str, dict[str, Any]]) -> str:
    """Return the README's five rows; ``results``: of ``CPU``, ``JOB`` and the kernels of ``GPU``, by these names."""
    cpu, gpu_results = results["CPU"]["machine_info"]["cpu"], results["GPU"]
    here = f"{cpu['brand_raw'].replace('(R)', '').removesuffix(' Processor')}, {cpu['count']} CPUs"
    float32, bfloat16 = _job_times(results["JOB"])
    select = _figure(results["CPU"], "test_selection_of_channels_whole_call").partition(" as fast")[0]
    vmap = _figure(results["CPU"], "test_scores_against_other_ways[resnet18-vmap]").partition(" as fast")[0]
    on_gpu = _measured_on(gpu_results)
    rows = [
        ("Select a channel mask from scores", "double argsort", f"{select} as fast", f"ResNet-18; {here}"),
        ("A whole job, two epochs of training", "masked dense gradients, float32",
         f"{float32} of the time; bfloat16: {bfloat16}", f"ResNet-18, 4,500 images; {here}"),
        ("Per-example scores", "`torch.func.vmap`", f"{vmap} as fast", f"ResNet-18, 32 examples; {here}"),
        ("**slower:** per-example scores of one batch of 32", "`torch.func.vmap`",
         _of_gpu(gpu_results, "per-example scores, whole call", "vmap"), f"ResNet-18; {on_gpu}"),
        ("**slower:** a compact training step", "the dense step",
         _of_gpu(gpu_results, "compact training step, whole call", "dense step"), f"ResNet-18, 32 pixels; {on_gpu}"),
    ]  # fmt: skip
    lines = (("what", "compared with", "result", "on"), ["---"] * 4, *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def answer(results: dict[str, dict[str, Any]], sections: dict[str, Any], before: dict[str, Any]) -> str:
    """Return five lines: where delfast is faster and slower, on a CPU and on a GPU, and what was not measured.

    ``results``: as for ``speed``; ``sections``: all of ``GPU``; ``before``: the kept times of the older kernels.
    """
    machine, gpu_results = results["CPU"]["machine_info"]["cpu"], results["GPU"]
    cpu = f"{machine['brand_raw'].replace('(R)', '').removesuffix(' Processor')}, {machine['count']} CPUs"

    def ratio(name: str) -> str:
        return _figure(results["CPU"], f"test_{name}").partition(" x ")[0]

    def least(test: str) -> float:
        names = [each["name"] for each in results["CPU"]["benchmarks"] if each["name"].startswith(f"test_{test}[")]
        if not names:
            raise InputError(f"the kept results have no figure for test_{test}; run `make bench` again")
        return min(float(ratio(name.removeprefix("test_"))) for name in names)

    def faster(name: str, other: str) -> str:
        return f"{1 / _times(gpu_results, name, other):.1f} x as fast"

    def slower(name: str, other: str) -> str:
        return f"{_times(gpu_results, name, other):.1f} x the time"

    float32, bfloat16 = _job_times(results["JOB"])
    calls = [cells[1] for cells in goal_rows(sections)]
    kernels = [cells[2] for cells in kernel_goal_rows(sections.get("bandwidth"), before)]
    missing = [sum(cell.startswith("not measured") for cell in cells) for cells in (calls, kernels)]
    select = ratio("selection_of_channels_whole_call")
    vmap = ratio("scores_against_other_ways[resnet18-vmap]")
    lines = {
        f"Faster on a CPU ({cpu})": (
            f"a channel mask from scores, {select} x as fast as a double argsort",
            f"per-example scores, {vmap} x as fast as `torch.func.vmap`",
            f"a whole job, {float32} of the usual loop's time, in bfloat16 {bfloat16}",
        ),
        "Slower on a CPU": (
            f"per-example sums of linear layers, from {least('per_example_linear'):.2f} x the speed of one product of "
            "the whole batch",
            f"of convolutions, from {least('per_example_convolutions'):.2f} x oneDNN's",
        ),
        f"Faster on a GPU ({_measured_on(gpu_results)})": (
            f"a channel mask, {faster('a channel mask, whole call', 'double argsort')} as a double argsort",
            f"criticality, {faster('criticality, mean of the top tenth', 'eager')} as eager PyTorch",
            f"masked AdamW, {faster('masked AdamW', 'fused')} as torch's fused AdamW",
        ),
        f"Slower on a GPU ({_measured_on(gpu_results)})": (
            f"per-example scores of one batch of 32, {slower('per-example scores, whole call', 'vmap')} of vmap",
            f"a compact training step, {slower('compact training step, whole call', 'dense step')} of the dense step",
        ),
        "Not measured": (
            f"{missing[0]} of the {len(calls)} targets of whole calls on a GPU, and {missing[1]} of the {len(kernels)} "
            "of kernels",
        ),
    }
    return "".join(f"- **{name}**: {'; '.join(parts)}.\n" for name, parts in lines.items())


def _measured_on(results: dict[str, Any]) -> str:
    """Return the GPU of the kept results, and the versions of torch and of delfast that were measured there."""
    made = results["provenance"]
    return f"{results['device']}, eager, torch {made['torch'].partition('+')[0]}, delfast {made['delfast']}"


def _job_times(results: dict[str, Any]) -> tuple[str, str]:
    """Return the time of a whole job on ResNet-18 over the usual loop's, in float32 and in bfloat16."""
    job = _figure(results, "test_whole_job[resnet18]")
    found = re.match(r"fp32 ([\d.]+), .*; bf16 ([\d.]+),", job)
    if found is None:
        raise InputError(f"'{JOB.name}' has no times for fp32 and bf16 in '{job}'; run `make bench` again")
    return found[1], found[2]


def _figure(results: dict[str, Any], name: str) -> str:
    """Return what a benchmark measured. InputError if it is not among the results."""
    for benchmark in results["benchmarks"]:
        if benchmark["name"] == name and "measured" in benchmark["extra_info"]:
            return str(benchmark["extra_info"]["measured"])
    raise InputError(f"the kept results have no figure for {name}; run `make bench` again")


def _of_gpu(results: dict[str, Any], name: str, other: str) -> str:
    """Return the time of a call on ResNet-18 in float32 over that of the other side, as text."""
    return f"{_times(results, name, other):.1f} x the time"


def _times(results: dict[str, Any], name: str, other: str) -> float:
    """Return the time of a call on ResNet-18 in float32 over that of the other side."""
    for result in results["results"]:
        if (result["name"], result["on"]) == (name, "resnet18, float32"):
            return float(result["call_us"] / result["others_us"][other])
    raise InputError(f"'{GPU.name}' has no figure for {name}; run `python -m benchmarks.gpu` again")


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw accuracy on the forget set before and after unlearning and of the oracle, for both scenarios of the demo.

    The mislabelled images come first and larger: only there is a retrained network far from the original.
    """
    names = {"original": "before", "del": "delfast", "oracle": "oracle\n(retrained)"}
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    scenarios = sorted(summary["scenarios"].items(), key=lambda item: item[0] != "mislabelled")
    panels = figure.subplots(1, len(scenarios), width_ratios=[1.7, *[1.0] * (len(scenarios) - 1)], sharey=True)
    for axes, (scenario, content) in zip(panels, scenarios, strict=True):
        values = [content["methods"][method]["forget_acc"] for method in names]
        bars = axes.bar(list(names.values()), values, color=["#999999", "#0072B2", "#009E73"])
        axes.bar_label(bars, fmt="%.1f", fontsize=11 if axes is panels[0] else 8)
        axes.tick_params(axis="x", labelsize=10 if axes is panels[0] else 7.5)
        axes.set_ylim(0, 115)
        axes.set_title(TITLES[scenario].format(content["forget"]["examples"]), fontsize=10 if axes is panels[0] else 8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("accuracy on the\nforget set, %", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Source": _source(), "Software": None})


def _drawn_from(path: Path) -> str | None:
    """Return the digest of what the figure was drawn from, as of ``_source``; None where there is no figure."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")


def _source() -> str:
    """Return the digest of what the figure is drawn from: the demo's results and the version of the drawing."""
    return hashlib.sha256(f"{DRAWING}\n".encode() + DEMO.read_bytes()).hexdigest()


def measured(results: dict[str, Any], source: str) -> str:
    """Return pytest-benchmark's JSON as a table: the machine, then a row for each result."""
    rows = []
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
        rows.append((test, case, extra["measured"], extra["target"]))
    machine, commit = results["machine_info"], results["commit_info"]
    where = f"{machine['cpu']['brand_raw']} ({machine['machine']}), {machine['cpu']['count']} CPUs"
    version = f"commit {commit['id'][:7]}{' with changes' if commit['dirty'] else ''}"
    threads = "/".join(sorted({str(benchmark["extra_info"]["threads"]) for benchmark in results["benchmarks"]}))
    head = f"{where}, {threads} threads, {usual} unless a row names another; "
    head += f"Python {machine['python_version']}; {version}."
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "", "| benchmark | case | measured | target |", "|---|---|---|---|", *lines, ""])


def call_costs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what a call of each op costs besides its kernel, in us, on both interfaces of torch."""
    old, new = (
        {b["params"]["op"]: float(b["extra_info"]["measured"].partition(" us over")[0]) for b in results["benchmarks"]}
        for results in (before, now)
    )
    rows = [
        (op, f"{old[op]:.1f}" if op in old else "", f"{cost:.1f}", f"{cost - old[op]:+.1f}" if op in old else "")
        for op, cost in new.items()
    ]
    commits = " and ".join(results["commit_info"]["id"][:7] for results in (before, now))
    threads = {b["extra_info"]["threads"] for b in now["benchmarks"]}
    head = f"{now['machine_info']['cpu']['brand_raw']}; threads: {min(threads)}; commits {commits}.\n\n"
    return head + markdown_table(("op, 62 tensors", "internal interface, us", "stable interface, us", "more"), rows)


def gpu(results: dict[str, Any]) -> str:
    """Return a line that names the GPU, and a row for each kernel on each network."""
    made = _checked(results)["provenance"]
    head = f"{results['device']}, copy {results['copy_gb_per_s']:.0f} GB/s; {_versions(made)}."
    return "\n".join([head, "", markdown_table(COLUMNS, [row(result) for result in results["results"]])])


def calls(sections: dict[str, Any]) -> str:
    """Return the targets of the whole calls on a GPU, measured or not, then the tables of every kept section."""
    parts = [markdown_table(GOALS, list(goal_rows(sections)))]
    for name, section in sections.items():
        if name not in ("kernels", "bandwidth") and not (section.get("skipped") and not section["results"]):
            made = _checked(section)["provenance"]
            parts += [f"`{name}`: {section['device']}; {_versions(made)}.\n"]
            parts += [
                markdown_table(SIDES, list(side_rows(section))),
                markdown_table(RATIOS, list(ratio_rows(section))),
            ]
    return "\n".join(parts)


def bandwidth(sections: dict[str, Any], kept: dict[str, Any]) -> str:
    """Return the targets of the kernels beside the prototype's figures, then what a GPU gave, where one did."""
    section = sections.get("bandwidth")
    parts = [markdown_table(KERNEL_GOALS, list(kernel_goal_rows(section, kept)))]
    if section is not None and section["results"]:
        made = _checked(section)["provenance"]
        parts += [f"{section['device']}, copy {section['copy_gb_per_s']:.0f} GB/s; {_versions(made)}.\n"]
        parts += [markdown_table(gpu_bandwidth.COLUMNS, [gpu_bandwidth.row(result) for result in section["results"]])]
    return "\n".join(parts)


def _versions(made: dict[str, Any]) -> str:
    """Return the versions in the provenance of results of a GPU."""
    return f"torch {made['torch']}, CUDA {made['cuda']}, delfast {made['delfast']}"


def _checked(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section of the kept results. InputError for one that failed."""
    if not section["results"] or section["failures"]:
        raise InputError(f"'{GPU.name}' is of a run that failed; run `python -m benchmarks.gpu` again")
    return section


def demo(summary: dict[str, Any]) -> str:
    """Return both scenarios of the demo's summary in one table, then a line on each and on the versions."""
    if summary["quick"]:
        raise InputError(f"'{DEMO.name}' is of `delfast demo --quick`; keep the summary.json of `make demo` there")
    measured, lines = {}, []
    for name, scenario in summary["scenarios"].items():
        forget, mask, methods = scenario["forget"], scenario["mask"], scenario["methods"]
        measured |= {f"{name}, {method}": values for method, values in methods.items()}
        line = f"- {name}: forget {forget['examples']} of {forget['of']} images; mask of {mask['selected']:,} of "
        line += f"{mask['total']:,} parameters, {mask['bytes']:,} bytes"
        before, after = (abs(methods[method]["delta_forget"]) for method in ("original", "del"))
        lines.append(line + (f"; DEL closes {100 * (1 - after / before):.0f} % of Δ forget" if before else ""))
    made, backend = summary["provenance"], summary["backend"]["backend"]
    versions = f"delfast {made['delfast']}, torch {made['torch']}, Python {made['python']}"
    lines.append(f"- {versions}, backend {backend}, seed {made['seed']}\n")
    return "\n".join([markdown_table(*method_table(measured)), *lines])


def sectors(report: str) -> str:
    """Return the largest ratio of each kind of kernel in the report, by how memory is aligned."""
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
            raise InputError(f"'{SECTORS.name}' has no figure for {kind}; make it again by the command at its top")
        rows.append([kind, *(f"{max(some):.2f}" for some in found)])
    return markdown_table(("sectors requested / least", *ALIGNMENTS), rows)


def cifar10(text: str) -> str:
    """Return the kept results of each setting: the original, the oracle, every method without a mask, and DEL within
    the mask of every strategy at the one budget.
    """
    every = csv.DictReader(io.StringIO(text))
    rows = [row for row in every if row["strategy"] == EVERYTHING or row["of"] == "del"]
    if not rows:
        raise InputError(
            f"'{CIFAR10.name}' holds no results; run the grid as experiments/results/cifar10-small/README.md describes"
        )
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


def causal_lm(result: dict[str, Any]) -> str:
    """Return a row for each model of examples/causal_lm.py, then a line on the run."""
    columns = ("model", "perplexity, held-out text", "loss, passages", "exposure, bits")
    fields = ("perplexity", "forget_loss", "exposure")
    rows = [[name, *(f"{row[field]:.2f}" for field in fields)] for name, row in result["models"].items()]
    settings, mask, versions = result["settings"], result["mask"], result["versions"]
    line = f"{settings['blocks']:,} blocks of 128 bytes of text; {settings['passages']} passages, each seen "
    line += f"{settings['repeats'] * settings['epochs']} times; {result['parameters']:,} parameters, a mask of "
    line += (
        f"{mask['selected']:,} of {mask['competing']:,} that compete; exposure among {settings['sample']} strings, at "
    )
    line += f"most {math.log2(settings['sample']):g} bits. torch {versions['torch']}, Python {versions['python']}.\n"
    return "\n".join([markdown_table(columns, rows), line])


def ledger(result: dict[str, Any]) -> str:
    """Return a row for each command of benchmarks/ledger.py, then a line on the run."""
    columns = ("command", "seconds", "seconds of CPU", "peak memory, MiB")
    rows = [
        [f"`{name}`", f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['peak_mib']:.0f}"]
        for name, row in result["commands"].items()
    ]
    machine = result["machine"]
    line = f"{result['requests']:,} requests of {result['ids']} examples, identifiers as HMACs, "
    line += f"{result['bytes'] / 2**20:.0f} MiB. {machine['cpus']} CPUs, {machine['cpu']}, with a load average of "
    line += f"{machine['load']:.1f} when it began; "
    line += f"Python {machine['python']}, SQLite {machine['sqlite']}.\n"
    return "\n".join([markdown_table(columns, rows), line])


def fill(text: str, name: str, content: str, page: Path) -> str:
    """Replace what stands between the markers of ``name``. InputError unless one pair of them is there."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda found: f"{found[1]}{content}{found[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise InputError(f"expected one pair of markers '<!-- {name} -->' in '{page.name}', got {count}; restore it")
    return filled


def pages() -> dict[Path, dict[str, str]]:
    """Return the tables of every page, by the names of their markers."""
    sections = read_kept(GPU)
    if "kernels" not in sections:
        raise InputError(f"'{GPU.name}' has no kernels; run `python -m benchmarks.gpu kernels`")
    kept = {"CPU": read_json(CPU), "JOB": read_json(JOB), "GPU": sections["kernels"]}
    before = read_json(gpu_bandwidth.BEFORE)
    return {
        README: {"speed": speed(kept)},
        BENCHMARKS: {
            "answer": answer(kept, sections, before),
            "measured": measured(kept["CPU"], CPU.name),
            "call-costs": call_costs(read_json(CALLS_BEFORE), read_json(CALLS)),
            "steps": measured(read_json(STEPS), STEPS.name),
            "job": measured(kept["JOB"], JOB.name),
            "memory": measured(read_json(MEMORY), MEMORY.name),
            "distributed": distributed_table(read_json(DISTRIBUTED)),
            "calls": calls(sections),
            "gpu": gpu(kept["GPU"]),
            "bandwidth": bandwidth(sections, before),
            "left-out": markdown_table(LEFT_OUT, list(left_out_rows(before))),
            "sectors": sectors(SECTORS.read_text(encoding="utf-8")),
        },
        RESULTS: {
            "demo": demo(read_json(DEMO)),
            "precision": "\n".join(precision_table(result) for _, result in sorted(read_json(PRECISION).items())),
            "cifar10": cifar10(CIFAR10.read_text(encoding="utf-8")),
            **{name: sequential.tables(sequential.read_records(path)) for name, path in SEQUENTIAL.items()},
            "audit": audit_table(read_json(AUDIT)),
        },
        LANGUAGE_MODELS: {"causal-lm": causal_lm(read_json(CAUSAL_LM))},
        LEDGER_PAGE: {"ledger": ledger(read_json(LEDGER)), "thresholds": thresholds_table(read_json(THRESHOLDS))},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages and the figure, or check them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Write the tables of the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs")
    check = parser.parse_args(arguments).check
    try:
        changed = {}
        for page, tables in pages().items():
            before = after = page.read_text(encoding="utf-8")
            for name, content in tables.items():
                after = fill(after, name, content, page)
            if before != after:
                changed[page] = after
        redraw = _drawn_from(FIGURE) != _source()
    except (InputError, OSError) as error:
        print(f"tables: error: {error}", file=sys.stderr)
        return 2
    if check:
        differing = [page.name for page in changed] + ([FIGURE.name] if redraw else [])
        if differing:
            advice = "run `python -m benchmarks.tables`"
            print(f"tables: {', '.join(differing)} differ from the kept results; {advice}", file=sys.stderr)
        return int(bool(differing))
    for page, text in changed.items():
        write_text(page, text)
    if redraw:
        draw(read_json(DEMO), FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
