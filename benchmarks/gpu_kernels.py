"""The section "kernels" of benchmarks.gpu: every op verified, then timed beside what people write today.

GB/s: the bytes that a kernel has to move, over the time of one replay of a CUDA graph of it, caches cold. "of copy":
that, over the GPU's own device-to-device copy. "call": the same as called from Python, with nothing else queued.
Others are timed as called, and under torch.compile where they are one function of tensors. Convolutions are timed in
PyTorch's default, TF32 for float32, and checked without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_cases import Case, cases
from benchmarks.gpu_measure import captures
from delfast.errors import one_line
from delfast.experiments.networks import build

ROUNDS, LEAST_ROUNDS, SECONDS = 30, 7, 0.3  # of a call: the most, and the fewest once it has taken these seconds
COMPILE_SECONDS = 20  # of one function; left out, and named, where less time is left
SETTINGS = (("resnet18", torch.float32), ("resnet18", torch.bfloat16), ("resnet50", torch.float32))


class Clock:
    """Median microseconds between two events around ``run``, with cold caches. On the CPU: of one call.

    ``queued``: all of it waits in the stream behind a pause before the first event comes, so that the time is the
    device's alone. Otherwise the device waits for the host, as it does for a single call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if captures(device):
            self._other = torch.ones(1 << 28, dtype=torch.uint8, device=device)  # more than any L2

    def __call__(self, run: Callable[[], Any], queued: bool = False) -> float:
        if not captures(self._device):
            started = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - started)
        times: list[float] = []
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
            if len(times) >= LEAST_ROUNDS and sum(times) > 1e6 * SECONDS:
                break
        return statistics.median(times)


def copy_rate(clock: Clock, device: torch.device) -> float:
    """Return the GB/s of a copy of 1 GiB from the device to itself: read and written. On the CPU, of 1 MiB."""
    source = torch.zeros(1 << (30 if captures(device) else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: target.copy_(source), queued=True) / 1e3


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernels(device: torch.device, tiny: bool, quick: bool, seconds: float) -> dict[str, Any]:
    """Verify and time every case; ``quick``: on one network in float32 alone. Stop after ``seconds``.

    Cases that fail their check are named in "failures" and not timed; what no time was left for, in "skipped".
    """
    began = time.perf_counter()
    clock = Clock(device)
    copy = copy_rate(clock, device)
    found: dict[str, Any] = {"copy_gb_per_s": copy, "results": [], "failures": [], "skipped": []}
    settings = [("resnet18-thin", torch.float32)] if tiny else SETTINGS[: 1 if quick else None]
    for name, dtype in settings:
        for case in cases(name, build(name, 10, 3, 32), dtype, device.type):
            left = seconds - (time.perf_counter() - began)
            if left < 0:
                found["skipped"].append(f"{case.name} on {case.setting}")
                continue
            try:
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    case.verify()
            except (AssertionError, RuntimeError) as error:
                found["failures"].append(f"{case.name} on {case.setting}: {one_line(error)}")
                continue
            compiled = captures(device) and dtype == torch.float32 and name == "resnet18"
            if compiled and case.compiles and left < COMPILE_SECONDS:
                found["skipped"].append(f"torch.compile of {case.name} on {case.setting}")
                compiled = False
            found["results"].append(_timed(case, clock, copy, device, compiled))
            print(" | ".join(row(found["results"][-1])), flush=True)
    return found


def _timed(case: Case, clock: Clock, copy: float, device: torch.device, compiled: bool) -> dict[str, Any]:
    others = {other: clock(run) for other, run in case.others.items()}
    if compiled:
        others |= {other: clock(torch.compile(run)) for other, run in case.compiles.items()}
    call = clock(case.ours)
    # a call that returns a Mask reads the answer on the host: no graph
    in_graph = captures(device) and "whole call" not in case.name
    graph = clock(graph_of(case.ours), queued=True) if in_graph else None
    rate = case.moved / (graph or call) / 1e3
    result = {"name": case.name, "on": case.setting, "graph_us": graph, "call_us": call, "bytes": case.moved}
    return result | {"gb_per_s": rate, "of_copy": rate / copy, "others_us": others}


COLUMNS = ("kernel", "on", "graph, µs", "call, µs", "GB/s", "of copy", "others, × the call's time")


def row(result: dict[str, Any]) -> list[str]:
    """Return the cells of ``COLUMNS``."""
    others = ", ".join(f"{name} {us / result['call_us']:.1f}" for name, us in result["others_us"].items())
    graph = "" if result["graph_us"] is None else f"{result['graph_us']:.1f}"
    figures = [f"{result['call_us']:.1f}", f"{result['gb_per_s']:.0f}", f"{result['of_copy']:.2f}"]
    return [result["name"], result["on"], graph, *figures, others]
