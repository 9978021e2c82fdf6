"""The cost of a call of an op besides its kernel.

benchmarks/results/calls_before.json was measured by the same code before torch's stable interface bound the ops.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.conftest import Versus
from delfast.ops import OPS
from tests.ops.calls import OF_ONE_LAYER, calls_on


@pytest.mark.parametrize("op", [op.name for op in OPS if op.name not in OF_ONE_LAYER])
def test_cost_of_a_call_with_62_tensors(versus: Versus, op: str) -> None:
    """Time 62 tiny tensors; the kernel's own time is that of one tensor with all rows, minus a call on an empty one."""
    many, one, none = (calls_on(shapes)[op] for shapes in ([(4, 4)] * 62, [(248, 4)], [(0, 4)]))

    def repeat(call: Callable[[], Any]) -> None:
        for _ in range(100):
            call()

    whole = []
    for call in (none, one):
        times = []
        for _ in range(21):
            started = time.perf_counter()
            repeat(call)
            times.append((time.perf_counter() - started) / 100)
        whole.append(statistics.median(times))
    kernel = max(0.0, whole[1] - whole[0])
    theta, grad = ([torch.randn(4, 4) for _ in range(62)] for _ in range(2))
    relative = versus(partial(repeat, many), partial(repeat, lambda: torch._foreach_add(theta, grad)), rounds=21)
    total = versus.benchmark.stats.stats.median / 100
    versus.report(
        f"{(total - kernel) * 1e6:.1f} us over the kernel's {kernel * 1e6:.1f} ({1 / relative:.2f} x _foreach_add)",
        "<= 25 us",
    )
