"""Processes that add at once or are killed while they add, and a disk that is full."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from delfast.ledger.store import Store

# adds requests until it is killed, and prints each number when it is on the disk; imports no torch
ADD = """
import sys
from delfast.ledger import Ledger
from delfast.ledger.identifiers import Identifiers
from delfast.ledger.store import Store

class Job:
    def positions(self, ids):
        return list(ids)

name, count = sys.argv[2], int(sys.argv[3])
ledger = Ledger(Store(sys.argv[1]), Job(), Identifiers())
print("ready", flush=True)
sys.stdin.readline()
for each in range(count):
    print(ledger.add([f"{name}-{each}-{part}" for part in range(10)], reason="x" * 500), flush=True)
"""


def start(directory: Path, name: str, count: int) -> subprocess.Popen[str]:
    """Start a process that is about to add; a line on its input starts it."""
    arguments = [sys.executable, "-c", ADD, str(directory), name, str(count)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = Store.create(tmp_path)
    store.append("created", {"hash_ids": False})
    store.close()
    return tmp_path


@pytest.mark.long
def test_two_processes_add_at_once(directory: Path) -> None:
    count = 50
    processes = [start(directory, name, count) for name in ("a", "b")]
    for process in processes:
        go(process)
    numbers = [[int(line) for line in process.communicate()[0].split()] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(own == sorted(own) and len(own) == count for own in numbers)
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 2 * count + 1))
    store = Store(directory)
    assert store.verify().holds and store.verify().count == 2 * count + 1
    ids = [each for entry in store.entries("received") for each in entry.payload["ids"]]
    assert len(set(ids)) == len(ids) == 20 * count


@pytest.mark.long
def test_one_of_two_processes_adds_an_example_that_both_name(directory: Path) -> None:
    processes = [start(directory, "same", 1) for _ in range(2)]
    for process in processes:
        go(process)
    outputs = sorted(process.communicate()[0] for process in processes)
    assert outputs == ["", "1\n"] and sorted(process.returncode for process in processes) == [0, 1]
    assert [entry.payload["request"] for entry in Store(directory).entries("received")] == [1]


@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.long), pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_whole_entries(kills: int, directory: Path) -> None:
    draw = random.Random(0)
    printed: list[int] = []
    for kill in range(kills):
        process = start(directory, f"process-{kill}", 10**6)
        go(process)
        time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        printed += [int(line) for line in output.split("\n")[:-1]]
        store = Store(directory)
        result = store.verify()
        requests = result.count - 1
        # each printed entry was on the disk; of the others, at most the entry that was about to be printed is there
        assert result.holds and len(printed) <= requests <= len(printed) + kill + 1
        store.close()
    assert len(printed) > kills and sorted(set(printed)) == printed
    store = Store(directory)
    assert [entry.payload["request"] for entry in store.entries("received")] == list(range(1, requests + 1))


def _mount_small_disk(directory: Path) -> None:
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk here: {done.stderr.decode().strip()}")


@pytest.mark.slow
def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    _mount_small_disk(tmp_path)
    try:
        (tmp_path / "ballast").write_bytes(bytes(40_000))
        store = Store.create(tmp_path)
        entries = []
        with pytest.raises(OSError, match=r"(No space left on device|Input/output error); the ledger is as it was"):
            for _ in range(10_000):
                entries.append(store.append("received", {"text": "x" * 3000}))
        assert len(entries) > 5 and list(store.entries()) == entries
        assert store.verify(entries[-1].hash).holds
        (tmp_path / "ballast").unlink()
        entries.append(store.append("received", {"text": "x" * 3000}))
        store.close()
        store = Store(tmp_path)
        assert list(store.entries()) == entries and store.verify(entries[-1].hash).holds
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
