"""Localization by several processes: peak memory over the model, bytes exchanged to select, and time.

``python -m benchmarks.distributed`` measures on a CPU with gloo, one thread a process, in two minutes, and writes
benchmarks/results/distributed.json; ``python -m benchmarks.tables`` writes it into docs/benchmarks.md. On Linux.

The peak is that of a process's resident memory over its value before the call, after a call on a small model. Tensors
of 64 KiB and more are mapped one by one, so that freed memory leaves the process at once.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import delfast
from benchmarks.memory import added_peak, own_added_peak
from delfast.experiments.reports import markdown_table
from delfast.files import write_json
from delfast.provenance import provenance

RESULTS = Path(__file__).parent / "results/distributed.json"
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "OMP_NUM_THREADS": "1",
}  # of the processes whose memory is measured
LARGE = {"vocabulary": 16000, "layers": 8}  # 59.9 million parameters; the largest has 17 % of them
FLAT = {"vocabulary": 500, "layers": 12}  # no unit of FSDP2, which it gathers as a whole, has more than 8 %
SMALL = {"vocabulary": 50, "layers": 1, "width": 16}
PROCESSES = (2, 4)
ALONE: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {  # a decoder, the number of batches, arguments
    "channels, several batches": (LARGE, 4, {}),
    "single parameters, several batches": (LARGE, 4, {"granularity": "param"}),
    "channels, one batch": (LARGE, 1, {}),
    "one process": (FLAT, 4, {}),
}
ROUNDS = 3
TIMED_BATCHES, TIMED_SHAPE = 4, (4, 65)  # examples, tokens


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(functional.scaled_dot_product_attention(*heads, is_causal=True))
        return x + self.down(self.up(self.norms[1](x)).relu())


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int = 640) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def decoder(vocabulary: int, layers: int, width: int = 640) -> Decoder:
    """Return a decoder that is the same on every process."""
    torch.manual_seed(0)
    return Decoder(vocabulary, layers, width)


def sharded(model: Decoder, mesh: Any) -> nn.Module:
    for unit in (*model.blocks, model.embedding, model.head):
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(count: int, shape: tuple[int, int] = (1, 9)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, shape, generator=generator) for _ in range(count)]


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def localize(model: nn.Module, forget: list[Tensor], **options: Any) -> delfast.Mask:
    return delfast.localize(model, forget, loss_fn=loss_fn, **options)


# Memory


def peak(model: nn.Module, small: nn.Module, count: int, **options: Any) -> int:
    """Return the bytes that localizing ``model`` by ``count`` batches adds to this process's peak."""
    return own_added_peak(
        lambda: localize(small, batches(2), **options), lambda: localize(model, batches(count), **options)
    )


def print_peak(case: str) -> None:
    network, count, options = ALONE[case]
    print(peak(decoder(**network), decoder(**SMALL), count, **options))


def peak_of_fsdp(rank: int) -> int:
    mesh = init_device_mesh("cpu", (count := dist.get_world_size(),))
    return peak(sharded(decoder(**FLAT), mesh), sharded(decoder(**SMALL), mesh), 2 * count, group=mesh)


def measure_memory() -> dict[str, float]:
    """Return the peaks in bytes a parameter; of several processes, the highest."""
    with patch.dict(os.environ, ENVIRONMENT):
        found = {
            case: added_peak("benchmarks.distributed", case) / parameters_of(network)
            for case, (network, _, _) in ALONE.items()
        }
        for count in PROCESSES:
            ranks = in_processes(count, peak_of_fsdp)
            found[f"FSDP2 on {count} processes"] = max(ranks) / parameters_of(FLAT)
    return found


def parameters_of(network: dict[str, int]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(**network).parameters())


def in_processes(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Return what a function of the rank returns on each of several processes."""
    from tests.distributed.spawning import run_in_processes  # requires pytest, which the tables do without

    with tempfile.TemporaryDirectory() as folder:
        return [found["it"] for found in run_in_processes(count, {"it": function}, Path(folder))]


# Bytes that are exchanged to select

CHECKS = 64 + 8 + 64  # of any selection: digests of arguments, another process's error, digests of masks
ERROR = 8  # before every exchange: whether another process has failed
HISTOGRAMS = 8 * (2**11 + 2**11 + 2**9)  # of the 31 bits of a score


def bytes_to_select(shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Return the bytes of all channels' scores, and of what decides on elements unless ties in a parameter do.

    shapes: those of the parameters, with their channels along dim 0.
    """
    shapes = list(shapes)
    units = sum(shape[0] for shape in shapes)
    bits = sum((math.prod(shape) + 7) // 8 for shape in shapes)
    return CHECKS + 4 * ERROR + 4 * units, CHECKS + 8 * ERROR + HISTOGRAMS + 9 * len(shapes) + bits


def llama_2_7b() -> list[tuple[int, ...]]:
    """Return the shapes of Llama 2 7B's parameters (arXiv 2307.09288)."""
    layer: list[tuple[int, ...]] = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    return [(32000, 4096), *layer * 32, (4096,), (32000, 4096)]


def exchanged(scores: delfast.Scores) -> list[int]:
    """Return the bytes that this process gives to all-reduces while it selects channels, and elements."""
    all_reduce, found = dist.all_reduce, list[int]()

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[-1] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        for granularity in ("channel", "param"):
            found.append(0)
            scores.select(0.5, granularity)
    return found


def exchanged_of_fsdp(rank: int) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = sharded(decoder(**FLAT), mesh)
    found = exchanged(delfast.score(model, batches(2), loss_fn=loss_fn, group=mesh))
    computed = bytes_to_select(tuple(p.shape) for p in model.parameters())
    ties = found[1] - computed[1]  # those of the last parameter are ranked by their indices
    assert found[0] == computed[0] and 0 <= ties <= 2 * (2**11 * 8 + ERROR), (found, computed)
    return found


# Time


def times(rank: int, rounds: int = ROUNDS) -> dict[str, list[tuple[float, float]]]:
    """Return wall and CPU seconds of this process of each way, which take turns.

    "one process" is rank 0, while the others wait. Other work on the machine adds to the wall time alone.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    forget, whole, parts = batches(TIMED_BATCHES, TIMED_SHAPE), decoder(**FLAT), sharded(decoder(**FLAT), mesh)
    ways: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "one process": (whole, {}),
        "DDP": (whole, {"group": mesh}),  # localize does not run the wrapper
        "FSDP2": (parts, {"group": mesh}),
    }
    expected = localize(whole, forget)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name, (model, options) in ways.items():
            dist.barrier()
            started = time.perf_counter(), time.process_time()
            mask = localize(model, forget, **options) if options or rank == 0 else expected
            dist.barrier()
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
            assert mask.jaccard(expected) > 0.999, name  # the sums are rounded otherwise
    return found


# Results


def measure() -> dict[str, Any]:
    """Return the peaks in bytes a parameter, the bytes exchanged to select channels and elements, and the seconds."""
    return {
        "memory": measure_memory(),
        "exchanged": {
            f"{parameters_of(FLAT) / 1e6:.1f} million parameters, FSDP2": max(in_processes(2, exchanged_of_fsdp)),
            "Llama 2 7B, computed from its shapes": bytes_to_select(llama_2_7b()),
        },
        "seconds": in_processes(2, times)[0],
    }


def table(result: dict[str, Any]) -> str:
    """Return the measurement: the machine, then a row for each figure."""
    rows = []
    for case, value in result["memory"].items():
        target = "<= 1" if case.endswith("one batch") else "<= 5" if case in ALONE else "falls with the processes"
        rows.append((f"peak over the model: {case}", f"{value:.2f} bytes a parameter", target))
    for model, (channels, elements) in result["exchanged"].items():
        values = f"{channels / 2**20:.2f} MiB for channels, {elements / 2**20:.1f} for single elements"
        rows.append((f"exchanged to select: {model}", values, "none"))
    rows += time_rows(result["seconds"]) if result["seconds"] else []
    made = result["provenance"]
    large, flat = (result["settings"][name] / 1e6 for name in ("large", "flat"))
    head = f"`{result['command']}`: {result['cpu']}, {result['cpus']} CPUs, gloo, 1 thread a process, a load of "
    head += (
        f"{result['load']} from other work; torch {made['torch']}. Decoders of {large:.1f} million parameters, from "
    )
    head += f'"one process" on of {flat:.1f}.'
    return "\n".join([head, "", markdown_table(("figure", "measured", "target"), rows)])


def time_rows(seconds: dict[str, list[tuple[float, float]]]) -> list[tuple[str, str, str]]:
    medians = {way: [statistics.median(each) for each in zip(*found, strict=True)] for way, found in seconds.items()}
    alone, *others = medians
    wall, cpu = medians[alone]
    rows = [(f"time of localize: {alone}", f"{wall:.1f} s, {cpu:.1f} s of CPU time", "none")]
    for way in others:
        ratios = medians[way][0] / wall, medians[way][1] / cpu
        ratio = f"{ratios[0]:.2f} x one process's, {ratios[1]:.2f} x its CPU time on each"
        rows.append((f"time of localize: {way} on 2 processes", ratio, "none"))
    return rows


def main() -> None:
    argparse.ArgumentParser("python -m benchmarks.distributed", description="Measure several processes.").parse_args()
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark, which the tables do without

    result = {
        "command": "python -m benchmarks.distributed",
        "cpu": get_cpu_info()["brand_raw"],
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of other work, at the start
        "settings": {
            "large": parameters_of(LARGE), "flat": parameters_of(FLAT), "rounds": ROUNDS, "batches": TIMED_BATCHES,
            "batch": TIMED_SHAPE,
        },
        **measure(),
        "provenance": provenance(device="cpu"),
    }  # fmt: skip
    write_json(RESULTS, result)
    print(table(result))


if __name__ == "__main__":
    main()
