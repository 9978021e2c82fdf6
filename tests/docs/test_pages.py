"""The Python of the pages in docs/: every block compiles, and runs unless it needs a process group."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import delfast
from tests import ROOT

BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    )
]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


@pytest.fixture
def job() -> dict[str, Any]:
    """Return the names that the pages take from the reader's job."""
    torch.manual_seed(0)

    def loader(count: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(count, 1, 6, 6), torch.arange(count) % 3), 4)

    model, forget = make_model(), loader(6)
    return {
        **{"torch": torch, "delfast": delfast, "Path": Path, "model": model, "make_model": make_model},
        **{"forget": forget, "forget_loader": forget, "retain": loader(12), "held_out": loader(4)},
        "mask": delfast.localize(model, forget, budget=0.3),
        "more": delfast.localize(model, forget, budget=0.5),
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_compiles_and_runs(
    block: str, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
    if "dist" in names:
        return  # it ends a process group of a job that is not on the page
    monkeypatch.chdir(tmp_path)
    exec(block, job)


def test_the_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 6
