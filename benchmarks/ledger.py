"""Time the commands of a ledger of many requests, and their peak memory, each as a process of its own.

python -m benchmarks.ledger   writes benchmarks/results/ledger.json

Options: ``--requests N``, ``--rounds N``, ``--output FILE``, and ``--reading``, which makes the ledger without a job
and times only the commands that read it.

A process's peak begins with that of the process that started it, so torch is not imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from delfast.ledger import Ledger
from delfast.ledger.artefacts import artefact
from delfast.ledger.identifiers import Identifiers, read_key
from delfast.ledger.store import Store

RESULTS = Path(__file__).parent / "results" / "ledger.json"
IDS = 10  # examples of a request
JOB = """
import torch
COUNT = {count}
def model(): return torch.nn.Linear(1, 2)
def train_set(): return torch.utils.data.TensorDataset(torch.arange(COUNT).float()[:, None], torch.arange(COUNT) % 2)
test_set = train_set
def example_ids(): return [f"person-{{i}}" for i in range(COUNT)]
"""


def measure(folder: Path, count: int, rounds: int, reading: bool) -> dict[str, Any]:
    """Return the median seconds and the largest memory of every command on a ledger of ``count`` requests."""
    ledger, key = folder / "ledger", folder / "key"
    found = {}
    if reading:
        make(ledger, key, count)
    else:
        job, requests = folder / "job.py", folder / "requests.jsonl"
        job.write_text(JOB.format(count=count * IDS), encoding="utf-8")
        with open(requests, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in forget_requests(count))
        subprocess.run([sys.executable, "-c", f"{JOB.format(count=1)}\n{SAVE}"], check=True, cwd=folder)
        common = ("--job", job, "--hash-ids", key)
        found["init"] = _command(["init", ledger, *common, "--model", folder / "model.safetensors"], 1)
        found["add --requests"] = _command(["add", ledger, *common, "--requests", requests], 1)
    last = f"person-{count * IDS - 1}"
    for label, arguments in {
        "list": ["list", ledger],
        "list --json": ["list", ledger, "--json"],
        "show N": ["show", ledger, count],
        "show --id ID": ["show", ledger, "--id", last, "--hash-ids", key],
        "verify": ["verify", ledger],
    }.items():
        found[label] = _command(arguments, rounds)
    return {"commands": found, "inside": _inside(ledger, count, rounds), "bytes": _size(ledger)}


def forget_requests(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        ids = [f"person-{number * IDS + each}" for each in range(IDS)]
        yield {"ids": ids, "reason": f"case {number}", "due": "2026-12-31"}


def make(path: Path, key: Path, count: int) -> None:
    """Make a ledger as the commands do, without a job's training set."""
    path.mkdir()
    identifiers = Identifiers(read_key(key, path, make=True))
    store = Store.create(path)
    model = path / "models" / "0000.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"")  # no command measured here loads it
    secrecy = {"hash_ids": True, "key_check": identifiers.key_check}
    store.append("created", {**secrecy, "model": artefact(path, model)})
    with Ledger(store, _AnyExample(), identifiers) as ledger:  # type: ignore[arg-type]
        ledger.add_requests(forget_requests(count))


class _AnyExample:
    """A job that has every example."""

    def positions(self, ids: Iterable[str]) -> None:
        pass


SAVE = "from safetensors.torch import save_file; save_file(model().state_dict(), 'model.safetensors')"


def _command(arguments: list[Any], rounds: int) -> dict[str, float]:
    """Run ``delfast ledger`` with its output in a file; seconds are medians, the memory is the largest."""
    command = [sys.executable, "-m", "delfast", "ledger", *map(str, arguments)]
    seconds, cpu, memory = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output)
            _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - started)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        cpu.append(usage.ru_utime + usage.ru_stime)
        memory.append(usage.ru_maxrss / 1024)
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu), "peak_mib": max(memory)}


def _inside(path: Path, count: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of the same operations in Python, without the start of a process."""
    with Ledger.open(path) as ledger:
        operations = {
            "requests": lambda: sum(1 for _ in ledger.requests()),
            "show": lambda: ledger.show(count),
            "verify": lambda: ledger.verify(),
        }
        return {name: statistics.median(_seconds(run) for _ in range(rounds)) for name, run in operations.items()}


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def _size(ledger: Path) -> int:
    return sum(path.stat().st_size for path in ledger.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--reading", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]  # seconds are longer on a busy machine, those of the CPU hardly
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.requests, options.rounds, options.reading)
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "cpu": _cpu(), "python": platform.python_version()}
    machine |= {"sqlite": sqlite3.sqlite_version, "load": load}
    kept = {"requests": options.requests, "ids": IDS, "rounds": options.rounds, **found, "machine": machine}
    options.output.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for name, row in found["commands"].items():
        print(f"{name:16} {row['seconds']:6.2f} s  {row['cpu_seconds']:6.2f} s CPU  {row['peak_mib']:6.0f} MiB")


if __name__ == "__main__":
    main()
