"""Gather the selected channels, or compute the dense weight gradient: what each takes, layer by layer.

``python -m benchmarks.compact_rules [--device cuda]`` measures the two ways of ``delfast.compaction.rules`` over a grid
of layers and writes benchmarks/results/compact_rules-DEVICE.json. On a CPU it takes a minute, with one thread for each
core. On a GPU both ways are captured in CUDA graphs, so that the host does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delfast.compaction.gradients import convolution_rows_gradient, linear_rows_gradient
from delfast.compaction.plan import RowPlan
from delfast.compaction.rules import LayerKind, rule_of

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.float32, torch.bfloat16)
FRACTIONS = (0.1, 0.3, 0.5, 0.75, 0.95)
# positions, then (output, input channels): a classifier head, a small transformer, ViT-B/16 on 64 images
LINEAR = {
    "cpu": ((64, 1024, 4096), ((192, 192), (768, 192))),
    "cuda": ((64, 128, 512, 1024, 2048, 4096, 12608), ((768, 768), (3072, 768), (2048, 2048))),
}
# examples, side of the feature map, channels in and out: the stages of ResNet-18 at 32 pixels
CONVOLUTION = {
    "cpu": ((16, 32, 64), (16, 16, 128), (16, 8, 256), (16, 4, 512)),
    "cuda": ((128, 32, 64), (128, 16, 128), (128, 8, 256), (128, 4, 512), (64, 56, 64), (64, 7, 512)),
}
Way = Callable[[], Tensor]


def layers(device: str) -> Iterator[tuple[dict[str, Any], Way, Way]]:
    """Yield the description of a layer, and the functions that compute the rows' gradient by gathering and densely."""
    for dtype, fraction in itertools.product(DTYPES, FRACTIONS):
        positions_of, shapes = LINEAR[device]
        for positions, (outputs, inputs) in itertools.product(positions_of, shapes):
            x, delta = random((positions, inputs), dtype, device), random((positions, outputs), dtype, device)
            rows = selected(outputs, fraction, device)
            yield (
                describe("linear", dtype, rows, outputs, inputs, positions),
                lambda x=x, delta=delta, rows=rows: linear_rows_gradient(x, delta, rows, None),
                lambda x=x, delta=delta, rows=rows: linear_rows_gradient(x, delta, None, rows),
            )
        for examples, side, channels in CONVOLUTION[device]:
            x, delta = (random((examples, channels, side, side), dtype, device) for _ in range(2))
            weight = random((channels, channels, 3, 3), dtype, device)
            rows = selected(channels, fraction, device)
            geometry = ((1, 1), (1, 1), (1, 1), False, (0, 0))
            plans = RowPlan(rows, None, None, 1), RowPlan(None, None, rows, 1)
            gather, dense = (
                lambda x=x, d=delta, w=weight, p=plan, g=geometry: convolution_rows_gradient(x, d, w, p, g)
                for plan in plans
            )
            yield describe("convolution", dtype, rows, channels, channels, examples * side**2), gather, dense


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    values = torch.randn(shape, device=device).to(dtype)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


def selected(channels: int, fraction: float, device: str) -> Tensor:
    return torch.randperm(channels)[: round(fraction * channels)].sort().values.to(device)


def describe(
    kind: LayerKind, dtype: torch.dtype, rows: Tensor, channels: int, opposite: int, positions: int
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    found = {"layer": kind, "dtype": name, "rows": len(rows), "channels": channels, "opposite": opposite}
    return {**found, "positions": positions}


def gathers(layer: dict[str, Any], device: str) -> bool:
    """Return what the rules choose for this layer; blocks of 16 channels."""
    rule = rule_of(torch.device(device), layer["layer"])
    blocks = (-(-layer[name] // 16) for name in ("rows", "channels"))
    return rule.gathers(*blocks) and rule.has_enough_positions(layer["positions"], getattr(torch, layer["dtype"]))


def microseconds(ways: tuple[Way, Way], device: str, rounds: int = 5) -> list[float]:
    """Return the median time of one call of each way, by rounds of one way after the other."""
    run = [captured(way) if device == "cuda" else repeated(way) for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for measure, found in zip(run, times, strict=True):
            found.append(measure())
    return [round(statistics.median(found) * 1e6, 1) for found in times]


def repeated(way: Way) -> Callable[[], float]:
    started = time.perf_counter()
    way()
    count = max(1, int(0.01 / (time.perf_counter() - started)))

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(count):
            way()
        return (time.perf_counter() - started) / count

    return measure


def captured(way: Way, count: int = 20) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            way()
    graph.replay()

    def measure() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure both ways to compute the weight gradient of selected rows.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    found = []
    for layer, gather, dense in layers(device):
        bound = 5e-2 if layer["dtype"] == "bfloat16" else 1e-4
        difference = (gather().float() - dense().float()).norm() / dense().float().norm()
        assert difference <= bound, (layer, float(difference))
        times = microseconds((gather, dense), device)
        layer |= {"gather_us": times[0], "dense_us": times[1], "ratio": round(times[0] / times[1], 2)}
        found.append(layer | {"rule": "gather" if gathers(layer, device) else "dense"})
        print(*(f"{value:>12}" for value in found[-1].values()), flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    kept = {"command": f"python -m benchmarks.compact_rules --device {device}", "torch": torch.__version__}
    path = RESULTS / f"compact_rules-{device}.json"
    lines = ",\n".join(f"  {json.dumps(layer)}" for layer in found)
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in {**kept, "device": name}.items())
    path.write_text(f'{{\n{head},\n "layers": [\n{lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
