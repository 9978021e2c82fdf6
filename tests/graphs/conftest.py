"""The backend of the tests of captured passes."""

from __future__ import annotations

import pytest
import torch

from delfast import graphs
from tests.graphs.double import Double


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[Double]:
    """Let CPUs have graphs; return the backends that jobs make."""
    made: list[Double] = []

    def make(device: torch.device) -> Double:
        made.append(Double(device))
        return made[-1]

    monkeypatch.setitem(graphs.BACKENDS, "cpu", make)
    return made
