"""Processes of one test: many scenarios in one start, since a start costs seconds, and a limit for every wait."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from delfast.errors import InputError
from delfast.joint_errors import encoded
from delfast.unlearning import Diverged
from tests.groups import gloo_group

LIMIT_S = 300  # of all scenarios of a start: half a minute on idle cores
WAIT_S = 120  # of one collective: less than the limit, so that a process that waits in vain fails by name


def run_in_processes(count: int, scenarios: dict[str, Callable[..., Any]], folder: Path) -> list[dict[str, Any]]:
    """Return for each rank name -> result of each scenario, a function of the rank; fail if one raises or hangs."""
    if sys.platform != "linux" or os.listdir("/sys/class/net") == []:
        pytest.skip("gloo by a shared file is tested on Linux with a network interface")
    context = start_processes(_run, (count, scenarios, folder), nprocs=count, join=False, start_method="spawn")
    assert context is not None
    end = time.monotonic() + LIMIT_S
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{count} processes did not end within {LIMIT_S} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, scenarios: dict[str, Callable[..., Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    with gloo_group(folder / "store", rank, count, WAIT_S):
        for name, scenario in scenarios.items():
            try:
                results[name] = scenario(rank)
            except Exception as error:
                traceback.print_exc()
                raise AssertionError(f"scenario {name} on rank {rank} of {count}: {error}") from error
    torch.save(results, folder / f"{rank}.pt")


def error_of(function: Callable[[], Any]) -> tuple[str, str] | None:
    """Return the type and the text of the error that a function raises.

    The process that fails raises its own exception: it is returned as the others name it.
    """
    try:
        function()
    except Exception as error:
        name, text = type(error).__name__, str(error)
        is_alike = isinstance(error, (InputError, Diverged)) or "(on rank " in text
        return (name, text) if is_alike else ("RuntimeError", encoded(error, dist.get_rank()).decode())
    return None
