"""The Python of the pages in docs/: every block compiles and runs, in a process group if it needs one.

The blocks of a page in IN_ORDER run one after another, with the commands between them, and print what the page says.
"""

from __future__ import annotations

import ast
import gc
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import delfast
from delfast.cli import main as delfast_command
from delfast.evaluation import Metrics
from tests import ROOT
from tests.ledger.small import write_job

IN_ORDER = ("getting_started", "measure")  # the second continues with what the first has made
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if page.stem not in IN_ORDER
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    )
]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


class LanguageModel(nn.Module):
    """Tokens (N, T) -> logits (N, T, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.mlp = nn.Embedding(7, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.mlp(self.embed_tokens(input_ids)).relu())


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
        **{"test": loader(4), "oracle": Metrics(50.0, 90.0, 60.0, 1.0, 0.2, 1.0), "oracles": [make_model()]},
        "mask": delfast.localize(model, forget, budget=0.3),
        "more": delfast.localize(model, forget, budget=0.5),
        **{"lm": LanguageModel(), "make_lm": LanguageModel},
        **{f"{name}_texts": [{"input_ids": torch.randint(7, (4, 5))}] for name in ("forget", "retain", "test")},
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_compiles_and_runs(
    block: str, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
    monkeypatch.chdir(tmp_path)
    if "Ledger" in names:
        write_job(tmp_path)
    if "dist" in names:
        run_in_a_group(block, job)
    else:
        exec(block, job)


def run_in_a_group(block: str, job: dict[str, Any]) -> None:
    """Run a block in a gloo group of this process, on the CPU."""
    save_file(job["model"].state_dict(), "fresh.safetensors")
    job |= {"dist": dist, "gc": gc, "init_device_mesh": init_device_mesh, "fully_shard": fully_shard}
    dist.init_process_group("gloo", init_method=f"file://{Path.cwd() / 'store'}", rank=0, world_size=1)
    try:
        job |= {"wrapped": nn.parallel.DistributedDataParallel(make_model()), "optimizer": None}
        if "state_dict(model, o" in block:  # the page is on sharded models
            fully_shard(job["model"])
        exec(block.replace('"cuda"', '"cpu"'), job)
    finally:
        job.clear()  # a group that is destroyed while a wrapper is alive may abort the process
        gc.collect()
        if dist.is_initialized():  # a page shows how a job ends
            dist.destroy_process_group()


def shape_of(text: str) -> str:
    """Return a printed text without its figures and digests, which differ from machine to machine."""
    return re.sub(r"\b[\da-f]{12}\b|[\d.,]+", "N", re.sub(r" +", " ", text.strip()))


@pytest.mark.long
def test_pages_in_order_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: pip install -r requirements-dev.txt")
    text = "\n".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in IN_ORDER)
    blocks = re.findall(r"^```(python|sh|text)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    printed, shown, commands = "", [], []
    for language, block in blocks:
        if language == "text":
            assert shape_of(printed) == shape_of(block)
            shown.append(block)
        elif language == "python":
            exec(block, space)
            printed = capsys.readouterr().out
        elif "# network" not in block:  # the marked ones are not run
            for line in block.splitlines():
                assert delfast_command(shlex.split(line)[1:]) == 0, line
            commands.append(capsys.readouterr().out)
    assert len(shown) == 6 and "kept to the mask" in commands[-1]
    before, after, oracle = (space[measured] for measured in ("before", "after", "oracle"))
    assert before.forget_acc > 40 and after.forget_acc < 10 and oracle.forget_acc < 10
    assert after.test_acc > oracle.test_acc - 5 and abs(after.mia - oracle.mia) < 10


def test_the_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 6
