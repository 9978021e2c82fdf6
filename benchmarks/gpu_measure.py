"""Measurements of a call for benchmarks.gpu: wall and busy time, launches, peak memory; float32's modes; CUDA graphs.

Runs on any device. On the CPU nothing is captured, and busy time, launches and peak memory are None.
"""

from __future__ import annotations

import gc
import inspect
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch.autograd import DeviceType

from delfast.errors import InputError

MODES = {
    "fp32": "float32 as torch runs it by default: TF32 in cuDNN's convolutions, not in products of matrices",
    "tf32": "float32, TF32 in products of matrices too",
    "bf16": "float32 parameters, bfloat16 autocast",
}
MODE_ORDER = ("bf16", "fp32", "tf32")  # if time runs out, it runs out in the last
NO_GRAPH = "no CUDA graph was replayed"  # the warning of a side that should have been captured
Figures = dict[str, Any]  # wall_ms, busy_ms, launches, peak_mib, rounds, captured, warnings


@contextmanager
def arithmetic(mode: str) -> Iterator[None]:
    """Set how float32 is computed inside the context, as ``MODES`` describes, and restore it afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = mode == "tf32", True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def autocast(device: torch.device, mode: str) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast in "bf16", else a context without effect.

    The cache of converted weights is off: a graph may not hold what an earlier call has cached.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=mode == "bf16", cache_enabled=False)


def captures(device: torch.device) -> bool:
    return device.type == "cuda"


def keywords(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Return ``wanted``. InputError if ``function`` lacks one of these keywords: a case may not run without it."""
    known = inspect.signature(function).parameters
    for name in wanted:
        if name not in known:
            raise InputError(
                f"expected delfast's {function.__name__} to have the keyword '{name}', it has not; "
                "run a version of delfast that has it"
            )
    return wanted


def delfast_keywords(
    function: Callable[..., Any], device: torch.device, mode: str, cuda_graphs: bool | Literal["auto"]
) -> dict[str, Any]:
    """Return the keywords by which a function of delfast runs in this mode, captured or not.

    ``cuda_graphs``: True captures every shape of batch; "auto", the default of delfast's users, those that pay.
    """
    wanted: dict[str, Any] = {"precision": "bf16"} if mode == "bf16" else {}
    return keywords(function, **wanted, **({"cuda_graphs": cuda_graphs} if captures(device) else {}))


class Captured:
    """A CUDA graph of ``step``, replayed by a call; on the CPU ``step`` itself.

    ``step`` reads and writes the same tensors in every call and reads nothing on the host. It is kept with the graph:
    what it holds, such as a network, may not be freed before.
    """

    def __init__(self, step: Callable[[], Any], device: torch.device) -> None:
        self._step, self._graph = step, None
        if not captures(device):
            return
        stream = torch.cuda.Stream(device)  # libraries allocate and choose algorithms outside the capture
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self._graph = graph

    def __call__(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()


# ---- sides of a case


@dataclass(frozen=True)
class Effort:
    """The rounds in which a call is timed: ``most``, or ``least`` if they take longer than ``seconds``; one before."""

    least: int = 2
    most: int = 10
    seconds: float = 0.4
    warm_up: bool = True


@dataclass(frozen=True)
class Whole:
    """A call measured as a whole. ``prepare`` returns the call to time; it runs before every round, untimed.

    ``profiled``: prepares a shorter call for the profiler, where the whole one has too many launches.
    """

    prepare: Callable[[], Callable[[], Any]]
    captured: bool = False
    profiled: Callable[[], Callable[[], Any]] | None = None


@dataclass(frozen=True)
class Marginal:
    """A call that processes a number of batches, measured by the batch: the difference of ``many`` and ``few``.

    What a call costs once - checks, a capture - is in both, and not in the difference.
    """

    make: Callable[[], Callable[[int], Any]]
    captured: bool = False
    few: int = 2
    many: int = 6


Side = Whole | Marginal


@dataclass(frozen=True)
class Case:
    """One comparison. ``ratios``: pairs of sides, whose wall and busy times are divided.

    ``check`` runs before the sides: it raises AssertionError for a wrong result, or returns further facts of the case.
    ``effort`` replaces that of the run.
    """

    what: str
    on: str
    mode: str
    sides: Mapping[str, Side]
    ratios: tuple[tuple[str, str], ...]
    check: Callable[[], dict[str, Any]] = dict
    effort: Effort | None = None

    @property
    def name(self) -> str:
        return f"{self.what}; {self.on}; {self.mode}"


def measure(side: Side, device: torch.device, effort: Effort) -> Figures:
    """Measure a side with nothing else on the GPU than what its case shares."""
    if captures(device):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with logged_warnings() as warned, counted_replays() as replays:
        figures = _whole(side, device, effort) if isinstance(side, Whole) else _marginal(side, device, effort)
    peak = torch.cuda.max_memory_reserved(device) / 2**20 if captures(device) else None
    if side.captured and captures(device) and not replays:
        warned.append(NO_GRAPH)
    return {**figures, "peak_mib": peak, "captured": bool(replays), "warnings": list(dict.fromkeys(warned))}


@contextmanager
def counted_replays() -> Iterator[Counter[str]]:
    """Count the replays of CUDA graphs inside the context."""
    counter: Counter[str] = Counter()
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: torch.cuda.CUDAGraph) -> None:
        counter["replays"] += 1
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", count):
        yield counter


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect what delfast logs as a warning inside the context, such as why it captures nothing."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("delfast")
    logger.addHandler(handler)
    try:
        yield warned
    finally:
        logger.removeHandler(handler)


def _whole(side: Whole, device: torch.device, effort: Effort) -> Figures:
    wall, rounds = _median(side.prepare, device, effort)
    busy, launches = profile_call((side.profiled or side.prepare)(), device)
    figures = {"wall_ms": wall, "busy_ms": busy, "launches": launches, "rounds": rounds}
    return figures | ({"profiled": "a shorter call"} if side.profiled and captures(device) else {})


def _marginal(side: Marginal, device: torch.device, effort: Effort) -> Figures:
    run, batches = side.make(), side.many - side.few
    (few, _), (many, rounds) = (
        _median(partial(partial, run, count), device, effort) for count in (side.few, side.many)
    )
    least, next_to_it = (profile_call(partial(run, count), device) for count in (side.few, side.few + 1))
    busy, launches = (None if None in pair else pair[1] - pair[0] for pair in zip(least, next_to_it, strict=True))
    return {"wall_ms": (many - few) / batches, "busy_ms": busy, "launches": launches, "rounds": rounds}


def _median(prepare: Callable[[], Callable[[], Any]], device: torch.device, effort: Effort) -> tuple[float, int]:
    """Return the median milliseconds of the prepared call, and the number of rounds."""
    if effort.warm_up:
        prepare()()
    times: list[float] = []
    while len(times) < effort.least or (len(times) < effort.most and sum(times) < 1e3 * effort.seconds):
        call = prepare()
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times), len(times)


def _wait(device: torch.device) -> None:
    if captures(device):
        torch.cuda.synchronize(device)


def profile_call(call: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """Return the milliseconds that kernels and copies take in a call, and how many there are.

    Two kernels at once count twice. (None, None) on the CPU, and where the profiler has seen nothing.
    """
    if not captures(device):
        return None, None
    _wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        call()
        _wait(device)
    return busy(recorded.events(), DeviceType.CUDA)


def busy(events: Iterable[Any], kind: DeviceType) -> tuple[Any, Any]:
    """Return the milliseconds and the number of a profile's events on this kind of device; (None, None) without any."""
    microseconds = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == kind and not event.is_user_annotation  # which spans kernels that are events too
    ]
    return (sum(microseconds) / 1e3, len(microseconds)) if microseconds else (None, None)


def warm_up_profiler(device: torch.device) -> None:
    """Start the profiler once, before any capture: it may not see the kernels of graphs that are older than itself."""
    profile_call(lambda: torch.ones(1, device=device) + 1, device)


def row_of(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Check a case and measure every side of it. AssertionError if the check fails."""
    with arithmetic(case.mode):
        facts = case.check()
        sides = {name: measure(side, device, case.effort or effort) for name, side in case.sides.items()}
    ratios = {f"{ours} / {other}": _ratios(sides[ours], sides[other]) for ours, other in case.ratios}
    return {"what": case.what, "on": case.on, "mode": case.mode, "sides": sides, "ratios": ratios, **facts}


def _ratios(ours: Figures, other: Figures) -> dict[str, float | None]:
    return {
        name: ours[f"{name}_ms"] / other[f"{name}_ms"] if ours[f"{name}_ms"] and other[f"{name}_ms"] else None
        for name in ("wall", "busy")
    }
