"""Time both sides in one run, in alternation, on the same threads; print ratios of medians, never a bare time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from delfast.ops import BACKEND

RESULTS: list[tuple[str, str, str]] = []


class Versus:
    """Time ``ours`` and a ``baseline`` in alternation: the baseline runs, timed, before each of our rounds."""

    def __init__(self, benchmark: Any, name: str) -> None:
        self.benchmark, self.name = benchmark, name

    def __call__(self, ours: Callable[[], Any], baseline: Callable[[], Any], rounds: int = 15) -> float:
        """Return the median time of the baseline divided by ours."""
        times: list[float] = []

        def timed_baseline() -> None:
            started = time.perf_counter()
            baseline()
            times.append(time.perf_counter() - started)

        self.benchmark.pedantic(ours, setup=timed_baseline, rounds=rounds, warmup_rounds=2)
        ratio = statistics.median(times[2:]) / self.benchmark.stats.stats.median
        self.benchmark.extra_info.update(ratio=ratio, baseline_seconds=statistics.median(times[2:]))
        return ratio

    def once(self, ours: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[Any, Any]:
        """Return the result of each side, for a figure that is not a time."""
        expected = baseline()
        result = self.benchmark.pedantic(ours, rounds=1)
        return result, expected

    def report(self, measured: str, target: str) -> None:
        """Add a row to the table that is printed at the end of the run."""
        RESULTS.append((self.name, measured, target))
        self.benchmark.extra_info.update(measured=measured, target=target, isa=isa(), threads=torch.get_num_threads())


def isa() -> str:
    return str(BACKEND.module.isa()) if BACKEND.module else "references"


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    return Versus(benchmark, request.node.name)


@pytest.fixture
def force_isa() -> Iterator[Callable[[str], None]]:
    """Run on one instruction set; skip if the CPU does not support it."""
    if BACKEND.module is None:
        pytest.skip(f"no native kernels: {BACKEND.reason}")
    before = BACKEND.module.isa()

    def force(name: str) -> None:
        if name not in BACKEND.module.isas():
            pytest.skip(f"this CPU has no {name}")
        BACKEND.module.force_isa(name)

    yield force
    BACKEND.module.force_isa(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not RESULTS:
        return
    terminalreporter.section(f"measured on {torch.get_num_threads()} threads, {isa()}")
    width = max(len(name) for name, _, _ in RESULTS)
    for name, measured, target in RESULTS:
        terminalreporter.write_line(f"{name:<{width}}  {measured:<44}  target {target}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Leave the host's name out of the results, which are kept in the repository; the processor stays."""
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {key: cpu[key] for key in ("arch", "brand_raw", "count") if key in cpu}
    machine_info["torch"] = torch.__version__


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the statistics, not every round's time."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
