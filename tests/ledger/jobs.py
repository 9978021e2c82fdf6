"""A job of a second's training, and a ledger for it."""

from __future__ import annotations

from pathlib import Path

import torch

from delfast.jobs import read_job
from delfast.ledger import Ledger
from delfast.unlearning import train

EXAMPLES = 300
JOB = '''"""Points around ten centres, and a small network."""
import torch
from torch import nn

EXAMPLES = {examples}


def _points(seed, count):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=generator)
    generator.manual_seed(seed)
    classes = torch.randint(0, 10, (count,), generator=generator)
    return torch.utils.data.TensorDataset(centres[classes] + torch.randn(count, 16, generator=generator), classes)


def model():
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


def train_set():
    return _points(1, EXAMPLES)


def test_set():
    return _points(2, 200)


def example_ids():
    return [f"person-{{i:04d}}" for i in range(EXAMPLES)]


batch_size = 32
training = {{"epochs": 6, "lr": 0.1}}
accept = {accept}
settings = {settings}
'''
LENIENT = {"test_drop": 60.0, "attack_advantage": 0.9}
SETTINGS = [
    {"method": "del", "budget": 0.3, "epochs": 4, "lr": 0.05},
    {"method": "finetune", "epochs": 2, "lr": 0.02},
]


def write_job(folder: Path, accept: dict[str, float] = LENIENT, settings: list[dict[str, object]] = SETTINGS) -> Path:
    """Write the job file and return its path."""
    path = folder / "job.py"
    path.write_text(JOB.format(examples=EXAMPLES, accept=accept, settings=settings))
    return path


def make_ledger(folder: Path, job: Path, *, references: int = 0, hash_ids: Path | None = None) -> Ledger:
    """Train the job's network, and return a ledger for it with references."""
    read = read_job(job)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = read.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train(model, read.batches(torch.arange(read.count), shuffle=True), optimizer, epochs=20)
    read.save(model, folder / "model.safetensors")
    ledger = Ledger.create(folder / "ledger", job=job, model=folder / "model.safetensors", hash_ids=hash_ids)
    if references:
        ledger.train_references(references, device="cpu")
    return ledger


def persons(first: int, last: int) -> list[str]:
    """Return the identifiers of examples from ``first`` to before ``last``."""
    return [f"person-{i:04d}" for i in range(first, last)]
