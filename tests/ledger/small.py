"""A job of a few examples, a store of a few entries, and changes of a database behind the ledger's back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from delfast.jobs import read_job
from delfast.ledger.store import SCHEMA, Store

EXAMPLES = 40
JOB = f"""
import torch

def model():
    return torch.nn.Linear(2, 2)

def train_set():
    inputs = torch.randn({EXAMPLES}, 2, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(inputs, torch.arange({EXAMPLES}) % 2)

test_set = train_set

def example_ids():
    return [f"person-{{number}}" for number in range({EXAMPLES})]
"""


def write_job(folder: Path) -> tuple[Path, Path]:
    """Write the job file and a checkpoint; return their paths."""
    path, model = folder / "job.py", folder / "model.safetensors"
    path.write_text(JOB, encoding="utf-8")
    job = read_job(path)
    job.save(job.model(), model)
    return path, model


def fill(store: Store) -> None:
    """Append entries of several events, with and without a run."""
    store.append("created", {"hash_ids": False})
    for number in range(1, 4):
        ids = [f"person-{2 * number + each}" for each in range(2)]
        store.append("received", {"request": number, "ids": ids, "count": 2, "reason": "Anlaß №", "due": None})
    for run, event in ((1, "started"), (1, "rejected"), (2, "started"), (2, "accepted")):
        store.append(event, {"requests": [1, 2], "seconds": 0.25}, run)


@contextmanager
def altered(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a store's database without its triggers, which are there again at the end."""
    connection = sqlite3.connect(path, isolation_level=None)
    triggers = [name for name, text in SCHEMA.items() if text.startswith("CREATE TRIGGER")]
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for name in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for name in triggers:
            connection.execute(SCHEMA[name])
        connection.execute("COMMIT")
    finally:
        connection.close()
