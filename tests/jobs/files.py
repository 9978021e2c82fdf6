"""Job files of tests: a network of two layers on random points."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from delfast.jobs import Job, read_job

HEAD = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
"""
MODEL = """
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""
DATA = """
def points(count, seed):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))

def train_set():
    return points(40, 0)

def test_set():
    return points(12, 1)
"""
WHOLE = HEAD + MODEL + DATA


def write_job(folder: Path, text: str = WHOLE, name: str = "job.py") -> Path:
    """Write a job file and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def job_of(folder: Path, more: str = "") -> Job:
    """Return the job of the file above with more lines at its end."""
    return read_job(write_job(folder, WHOLE + more))


def line_of(path: Path, text: str) -> int:
    """Return the number of the last line with this text."""
    return [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if text in line][-1]


def points(count: int, seed: int) -> TensorDataset:
    """Return the data set that the file's ``points`` returns."""
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network() -> nn.Module:
    """Return a network as the file's ``model`` returns one."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
