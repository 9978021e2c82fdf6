"""Peak memory of localization over the model, and what the processes exchange to select.

The peak is that of the process's resident memory (VmHWM of /proc) over its value before the call, after a call on a
small model. Tensors of 64 KiB and more are mapped one by one, so that freed memory leaves the process at once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import delfast
from tests.distributed.spawning import run_in_processes

VOCABULARY, WIDTH, LAYERS = 16000, 640, 8


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        heads = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(*heads, is_causal=True))
        return x + self.down(self.up(self.norms[1](x)).relu())


class Decoder(nn.Module):
    """59.9 million parameters; the largest has 17 % of them."""

    def __init__(self, vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model, tokens):
    return functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def tokens(count):
    return [torch.randint(0, 50, (1, 9)) for _ in range(count)]


def sharded(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard([model.embedding], mesh=mesh)
    fully_shard([model.head], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def peak(model, small, count, group=None, **options):
    """Return the bytes that localizing ``model`` adds to this process's peak, after localizing ``small``."""
    delfast.localize(small, tokens(2), loss_fn=loss_fn, group=group, **options)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    delfast.localize(model, tokens(count), loss_fn=loss_fn, group=group, **options)
    return _status("VmHWM") - before


def _status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


FLAT = {"vocabulary": 500, "layers": 12}  # no unit of FSDP2, which it gathers as a whole, has more than 8 %


def bytes_per_parameter(count, flat=False, **options):
    """Print the peak of one process."""
    model = Decoder(**FLAT if flat else {})
    total = sum(p.numel() for p in model.parameters())
    print(peak(model, Decoder(50, 16, 1), count, **options) / total)


def of_fsdp(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model, small = sharded(Decoder(**FLAT), mesh), sharded(Decoder(50, 16, 1), mesh)
    total = sum(p.numel() for p in model.parameters())
    return peak(model, small, 2 * dist.get_world_size(), mesh) / total


def in_a_process(count, **options):
    call = f"from tests.distributed import test_memory; test_memory.bytes_per_parameter({count}, **{options})"
    command = [sys.executable, "-W", "ignore", "-c", call]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak from /proc")
def test_peak_bytes_per_parameter(monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = {
        "channels": in_a_process(4),
        "elements": in_a_process(4, granularity="param"),
        "one batch": in_a_process(1),
        "flat": in_a_process(4, flat=True),
    }
    for processes in (2, 4):
        (folder := tmp_path / str(processes)).mkdir()
        ranks = run_in_processes(processes, {"peak": of_fsdp}, folder)
        found[f"flat, FSDP2 on {processes}"] = max(each["peak"] for each in ranks)
    print({name: round(value, 2) for name, value in found.items()})
    assert found["channels"] <= 5.0 and found["elements"] <= 5.0
    assert found["one batch"] <= 1.0
    assert found["flat"] - 0.5 > found["flat, FSDP2 on 2"] > found["flat, FSDP2 on 4"] + 0.5
