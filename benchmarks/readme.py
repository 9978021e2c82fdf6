"""Writes the README's tables from the results kept beside this file, so that no number in it is typed.

python -m benchmarks.readme           rewrites README.md
python -m benchmarks.readme --check   exit code 1 if README.md differs from the results; 2, either way, for bad input
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delfast.cli.demo import title
from delfast.errors import InputError
from delfast.files import read_json, write_text
from delfast.report import METHOD_COLUMNS, markdown_table, method_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CPU = ROOT / "benchmarks/results/cpu.json"  # of `make bench`
DEMO = ROOT / "benchmarks/results/demo.json"  # the summary.json of `make demo`


def measured(results: dict[str, Any]) -> str:
    """The table of pytest-benchmark's JSON, and the machine it was measured on."""
    rows, threads, isas = [], set(), set()
    for benchmark in results["benchmarks"]:
        extra, name = benchmark["extra_info"], benchmark["name"]
        if missing := {"measured", "target", "threads", "isa"} - extra.keys():
            raise InputError(f"'{CPU.name}' has no {sorted(missing)[0]} for {name}: it failed; run `make bench` again")
        parameters = {k: v for k, v in (benchmark["params"] or {}).items() if isinstance(v, str)}
        words = name.partition("[")[0].removeprefix("test_").replace("_", " ")
        rows.append([": ".join(filter(None, (words, ", ".join(parameters.values())))), extra["measured"]])
        rows[-1].append(extra["target"])
        threads.add(str(extra["threads"]))
        isas |= set() if "isa" in parameters else {extra["isa"]}
    if not rows:
        raise InputError(f"'{CPU.name}' holds no benchmark; run `make bench` again")
    machine, commit = results["machine_info"], results["commit_info"]
    cpu = machine["cpu"]
    where = f"{cpu['brand_raw']} ({machine['machine']}), {cpu['count']} CPUs, {'/'.join(sorted(threads))} threads"
    if isas:
        where += f", {'/'.join(sorted(isas))} where none is named"
    python = f"{machine['python_implementation']} {machine['python_version']}"
    version = f"commit {commit['id'][:7]}{' with changes' if commit['dirty'] else ''}, {results['datetime'][:10]}"
    return f"{where}; {python}; {version}.\n\n{markdown_table(('benchmark', 'measured', 'target'), rows)}"


def demo(summary: dict[str, Any]) -> str:
    """A table a scenario of the demo, its mask, and how much of the original's gap DEL closes."""
    if summary["quick"]:
        raise InputError(f"'{DEMO.name}' is of `delfast demo --quick`; keep the summary.json of `make demo` there")
    blocks = []
    for name, scenario in summary["scenarios"].items():
        mask, methods = scenario["mask"], scenario["methods"]
        text = f"**{title(name, scenario)}.** Mask: {mask['selected']:,} of {mask['total']:,} parameters"
        text += f" in {mask['bytes']:,} bytes."
        before, after = (abs(methods[method]["delta_forget"]) for method in ("original", "del"))
        if before:
            text += f" DEL closes {100 * (1 - after / before):.0f} % of the original's Δ forget."
        blocks.append(f"{text}\n\n{markdown_table(METHOD_COLUMNS, method_rows(methods))}")
    origin, backend = summary["provenance"], summary["backend"]
    made = f"torch {origin['torch']}, Python {origin['python']}, backend {backend['backend']}, seed {origin['seed']}"
    return "\n".join([*blocks, f"Made with {made}.\n"])


def fill(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced; InputError unless they are there once."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, times = re.subn(pattern, lambda found: f"{found[1]}{content}{found[2]}", text, flags=re.DOTALL)
    if times != 1:
        raise InputError(f"expected one pair of markers '<!-- {name} -->' in '{README.name}', got {times}; put it back")
    return filled


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description="write the README's tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README differs")
    check = parser.parse_args(arguments).check
    try:
        before = README.read_text(encoding="utf-8")
        after = fill(fill(before, "measured", measured(read_json(CPU))), "demo", demo(read_json(DEMO)))
    except (InputError, OSError, KeyError) as error:
        reason = f"the results have no {error}; make them anew" if isinstance(error, KeyError) else str(error)
        print(f"readme: error: {reason}", file=sys.stderr)
        return 2
    if check and before != after:
        print("readme: README.md differs from benchmarks/results; run `python -m benchmarks.readme`", file=sys.stderr)
        return 1
    if not check:
        write_text(README, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
