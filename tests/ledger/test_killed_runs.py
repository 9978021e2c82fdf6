"""A run that is killed at any moment is continued to the same bits: in processes of its own, see ``killing``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill(count: int, seed: int, timeout: float) -> str:
    """Kill ``count`` runs at random moments; return what was printed."""
    command = [sys.executable, "-m", "tests.ledger.killing", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_killed_runs_end_with_the_same_bits() -> None:
    assert "every run ended with the same bits" in kill(4, seed=0, timeout=600)


@pytest.mark.slow
def test_forty_killed_runs_end_with_the_same_bits() -> None:
    assert "every run ended with the same bits" in kill(40, seed=1, timeout=3600)
