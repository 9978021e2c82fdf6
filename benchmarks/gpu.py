"""The CUDA kernels on the card that is here: `python -m benchmarks.gpu`. Takes under eight minutes.

Builds the extension for this card, checks every case against the CPU kernels or a PyTorch baseline, then times it
beside what people write today, and writes benchmarks/results/gpu.json. What fails its check is named there and not
timed. Exit code 1 without a device or on a failure.

GB/s: the bytes that a kernel has to move, over the time of one replay of a CUDA graph of it, caches cold. "of copy":
that, over the card's own device-to-device copy. "call": the same as called from Python, with nothing else queued.
Others are timed as called, and under torch.compile where they are one function of tensors. Convolutions are timed in
PyTorch's default, TF32 for float32, and checked without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/gpu.json"
COLUMNS = ("kernel", "on", "graph, µs", "call, µs", "GB/s", "of copy", "others, × the call's time")
BUILT = "DELFAST_BENCHMARK_BUILT"  # set for the process that measures, once the build is done
ROUNDS = 30


def build() -> None:
    """Build the extension in place, for this card alone. CalledProcessError if that fails."""
    major, minor = torch.cuda.get_device_capability()
    environment = {**os.environ, "DELFAST_NATIVE": "1", "DELFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)


class Clock:
    """Median microseconds between two events around ``run``, with cold caches.

    ``queued``: all of it waits in the stream behind a pause before the first event comes, so that the time is the
    device's alone. Otherwise the device waits for the host, as it does for a single call.
    """

    def __init__(self) -> None:
        self._other = torch.ones(1 << 28, dtype=torch.uint8, device="cuda")  # more than any L2

    def __call__(self, run: Callable[[], Any], queued: bool = False) -> float:
        times = []
        for number in range(ROUNDS + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.amax()  # reading leaves nothing to be written back later
            if queued:
                torch.cuda._sleep(1_000_000)  # cycles: about half a millisecond
            else:
                torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                times.append(begin.elapsed_time(end) * 1000)
        return statistics.median(times)


def copy_rate(clock: Clock) -> float:
    """Return the GB/s of a device-to-device copy of 1 GiB: read and written."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source), queued=True) / 1e3


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(quick: bool) -> dict[str, Any]:
    from benchmarks.gpu_cases import cases
    from delfast.experiments.networks import build as build_network
    from delfast.files import one_line
    from delfast.provenance import provenance

    clock = Clock()
    copy = copy_rate(clock)
    results, failures = [], []
    settings = [("resnet18", torch.float32), ("resnet18", torch.bfloat16), ("resnet50", torch.float32)]
    for name, dtype in settings[: 1 if quick else None]:
        for case in cases(name, build_network(name, 10, 3, 32), dtype, "cuda"):
            try:
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    case.verify()
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{case.name} on {case.setting}: {one_line(error)}")
                print(f"FAILED {failures[-1]}", flush=True)
                continue
            others = {other: clock(run) for other, run in case.others.items()}
            if dtype == torch.float32 and name == "resnet18":  # compiling takes most of a minute
                others |= {other: clock(torch.compile(run)) for other, run in case.compiles.items()}
            call = clock(case.ours)
            # what returns a Mask reads the answer on the host: no graph
            graph = clock(graph_of(case.ours), queued=True) if "whole call" not in case.name else None
            rate = case.moved / (graph or call) / 1e3
            result = {"name": case.name, "on": case.setting, "graph_us": graph, "call_us": call, "bytes": case.moved}
            results.append(result | {"gb_per_s": rate, "of_copy": rate / copy, "others_us": others})
            print(" | ".join(row(results[-1])), flush=True)
    capability = list(torch.cuda.get_device_capability())
    facts = {"device": torch.cuda.get_device_name(), "capability": capability, "copy_gb_per_s": copy}
    return {
        **facts,
        "provenance": provenance(cuda=torch.version.cuda, rounds=ROUNDS),
        "results": results,
        "failures": failures,
    }


def row(result: dict[str, Any]) -> list[str]:
    others = ", ".join(f"{name} {us / result['call_us']:.1f}" for name, us in result["others_us"].items())
    graph = "" if result["graph_us"] is None else f"{result['graph_us']:.1f}"
    figures = [f"{result['call_us']:.1f}", f"{result['gb_per_s']:.0f}", f"{result['of_copy']:.2f}"]
    return [result["name"], result["on"], graph, *figures, others]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time the CUDA kernels.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON to write")
    parser.add_argument("--quick", action="store_true", help="one network in float32 alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu: error: expected a CUDA device, found none; run this on a machine with a GPU", file=sys.stderr)
        return 1
    if BUILT not in os.environ:
        try:
            build()
        except subprocess.CalledProcessError as error:
            print(f"gpu: error: the build failed, see above: {error}", file=sys.stderr)
            return 1
        # a new process: this one may have loaded the extension as it was
        command = [sys.executable, "-m", "benchmarks.gpu", *(arguments if arguments is not None else sys.argv[1:])]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, BUILT: "1", "DELFAST_BACKEND": "native"}).returncode

    from delfast.experiments.reports import markdown_table
    from delfast.files import write_json

    begin = time.perf_counter()
    results = measure(options.quick)
    write_json(options.output, results)
    print(f"\n{results['device']}, copy {results['copy_gb_per_s']:.0f} GB/s, {time.perf_counter() - begin:.0f} s\n")
    print(markdown_table(COLUMNS, [row(result) for result in results["results"]]))
    for failure in results["failures"]:
        print(f"gpu: error: {failure}", file=sys.stderr)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
