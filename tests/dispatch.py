"""Count what a computation dispatches to torch: its operations, and the host's reads of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Count the operations in the context by name. ``reads``: those that wait for a device to read its values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        tags = getattr(func, "tags", ())
        by_position = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if (torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags) and not by_position:
            self.reads[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def per_batch(function: Callable[[int], Any]) -> tuple[float, Counter[str]]:
    """Return the operations, and the reads by name, of one more batch: ``function(n)`` runs n batches."""
    few, many = Dispatched(), Dispatched()
    with few:
        function(2)
    with many:
        function(6)
    return (many.total - few.total) / 4, many.reads - few.reads
