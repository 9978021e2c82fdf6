"""Kill runs of a ledger at random moments, and check that the next run ends as an uninterrupted one.

    python -m tests.ledger.killing COUNT SEED

A process of its own, so that it forks before torch has threads: a child starts at once and is killed inside the work.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from delfast.ledger import Ledger
from tests.ledger.jobs import make_ledger, persons, write_job

SETTINGS: list[dict[str, Any]] = [
    {"method": "del", "budget": 0.3, "epochs": 4, "lr": 0.05},
    {"method": "scrub", "budget": 0.3, "strategy": "salloc", "epochs": 3, "lr": 0.01},
]


def run_in_child(path: Path, job: Path, delay: float | None) -> int:
    """Run a ledger in a child process, killed after ``delay`` seconds; return the child's wait status."""
    child = os.fork()
    if not child:
        with Ledger.open(path, job=job) as ledger:
            result = ledger.run(device="cpu")
        os._exit(0 if result.accepted else 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def outcome(path: Path) -> dict[str, Any]:
    """Return what must not depend on where a run was stopped: everything except times, versions and digests of them."""
    with Ledger.open(path) as ledger:
        assert ledger.verify().holds, ledger.verify().problems
        entries = [(entry.event, entry.payload) for entry in ledger.store.entries(run=1)]
    found = {event: payload for event, payload in entries if event != "resumed"}
    assert len(found) == len([event for event, _ in entries if event != "resumed"]), "a step was recorded twice"
    for payload in found.values():
        payload.pop("seconds", None)
    for event in ("baseline", "audited"):
        found[event].pop("audit")  # a file with seconds in it
        found[event]["figures"].pop("seconds")
    return found


def main(count: int, seed: int) -> None:
    """Kill ``count`` runs, by turns of the methods, each at a random moment, and compare."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder)
        with make_ledger(start, write_job(start), references=2) as ledger:
            ledger.add(persons(0, 60))
        jobs = []
        for setting in SETTINGS:
            folder = start / setting["method"]
            folder.mkdir()
            jobs.append(write_job(folder, settings=[setting]))
        wholes = [whole_run(start / "ledger", job) for job in jobs]
        killed = 0
        for number in range(count):
            job, (duration, expected) = jobs[number % len(jobs)], wholes[number % len(jobs)]
            killed += kill_run(start / "ledger", job, duration, expected, draw)
    print(f"{killed} kills in {count} runs: every run ended with the same bits")


def whole_run(ledger: Path, job: Path) -> tuple[float, dict[str, Any]]:
    """Run a copy of the ledger without a stop; return the seconds and the outcome."""
    copy = job.parent / "whole"
    shutil.copytree(ledger, copy)
    began = time.perf_counter()
    assert run_in_child(copy, job, None) == 0
    return time.perf_counter() - began, outcome(copy)


def kill_run(ledger: Path, job: Path, duration: float, expected: dict[str, Any], draw: random.Random) -> int:
    """Kill runs of a copy of the ledger until one goes on to its end; return the number of kills."""
    copy = job.parent / "killed"
    shutil.copytree(ledger, copy)
    killed = 0
    while True:  # a run that goes on may be killed again
        status = run_in_child(copy, job, draw.uniform(0, duration))
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        with Ledger.open(copy) as opened:
            assert opened.verify().holds, opened.verify().problems
        if draw.random() < 0.7:
            status = run_in_child(copy, job, None)
            break
    assert status == 0, status
    assert outcome(copy) == expected
    shutil.rmtree(copy)
    return killed


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
