"""A ledger of many requests: commands that read it take little time, and memory that does not grow with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

READING = {"list", "list --json", "show N", "show --id ID", "verify"}


@pytest.mark.parametrize(
    ("count", "seconds", "options"),
    [
        pytest.param(5_000, 1.0, ["--reading", "--rounds", "1"], marks=pytest.mark.long),
        pytest.param(100_000, 2.0, [], marks=pytest.mark.slow),
    ],
)
def test_many_requests_are_read_fast(count: int, seconds: float, options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    command = [sys.executable, "-m", "benchmarks.ledger", "--requests", str(count), "--output", str(output), *options]
    subprocess.run(command, check=True, cwd=ROOT)  # in a small process: a child's peak begins with its parent's
    found = json.loads(output.read_text(encoding="utf-8"))["commands"]
    assert found.keys() >= READING
    # the time of the CPU: other processes of a busy machine do not count
    assert {name for name in READING if found[name]["cpu_seconds"] > seconds} == set()
    assert {name for name in READING if found[name]["peak_mib"] > 100} == set()
