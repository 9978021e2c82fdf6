"""Process groups of torch.distributed for tests: joined, and left without a race."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def gloo_group(store: Path, rank: int = 0, processes: int = 1, wait_s: float = 1800) -> Iterator[None]:
    """A gloo group of ``processes``, which meet at the file ``store`` and wait at most ``wait_s`` for one another.

    Make every DistributedDataParallel in a function that is called inside, so that it is out of scope at the end. A
    group that is destroyed while a reducer is alive, or while another process still uses it, sometimes aborts the
    process ("terminate called without an active exception": 7 of 20 bare runs). So first the processes wait for one
    another and the wrappers are collected. After an error the others may never arrive: then there is no waiting.
    """
    wait = datetime.timedelta(seconds=wait_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=wait)
    try:
        yield
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()
