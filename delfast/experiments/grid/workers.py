"""Run a grid's tasks in worker processes: one setting and seed after the other, networks before the cells."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from delfast.experiments.interrupts import exit_after, interrupts_held
from delfast.experiments.run import commit

Watch = Callable[[str, int, int], None]
"""``watch(what, done, of)`` is called after every network and every cell."""
Task = Callable[[], Any]
"""A task is sent to a worker process: a ``functools.partial`` of a function of a module."""


@dataclass
class Stage:
    """The tasks of one setting and seed. ``cells`` begin when all ``networks`` are done and ``check`` has returned."""

    networks: deque[Task]
    cells: deque[Task]
    check: Callable[[], object]
    running: dict[str, int] = field(default_factory=lambda: {"networks": 0, "cells": 0})

    @property
    def done(self) -> bool:
        return not (self.networks or self.cells or any(self.running.values()))

    def next(self) -> tuple[str, Task] | None:
        """Return the next task that can begin, and its kind; None while there is none."""
        if self.networks:
            return "networks", self.networks.popleft()
        if self.cells and not self.running["networks"]:
            return "cells", self.cells.popleft()
        return None


def run_stages(stages: Sequence[Stage], workers: int, threads: int, *, ahead: bool, watch: Watch) -> None:
    """Run all tasks, those of an earlier stage first, in ``workers`` processes of ``threads`` threads each.

    ``ahead``: whether a worker for which no task of the earlier stages is ready begins one of a later stage. Workers
    that share a GPU do not: the earlier stage would end later. The first error stops the rest and is raised.
    """
    counts = {what: sum(len(getattr(stage, what)) for stage in stages) for what in ("networks", "cells")}
    finished = dict.fromkeys(counts, 0)
    running: dict[Future[Any], tuple[Stage, str]] = {}
    for what, count in counts.items():
        if not count:
            watch(what, 0, 0)
    for stage in stages:
        if not stage.networks:
            stage.check()
    with _pool(max(1, min(workers, sum(counts.values()))), threads) as pool:
        while True:
            while len(running) < workers and (found := _next(stages, ahead)) is not None:
                stage, what, task = found
                # a terminal sends Ctrl-C to the workers too, which must leave it to this process
                with interrupts_held():
                    running[pool.submit(task)] = stage, what
                stage.running[what] += 1
                if sum(each.running[what] for each in stages) == 1 and not finished[what]:
                    watch(what, 0, counts[what])
            if not running:
                return
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                future.result()
                stage, what = running.pop(future)
                stage.running[what] -= 1
                finished[what] += 1
                watch(what, finished[what], counts[what])
                if what == "networks" and not stage.networks and not stage.running[what]:
                    stage.check()


def _next(stages: Iterable[Stage], ahead: bool) -> tuple[Stage, str, Task] | None:
    """Return the first task that can begin, with its stage and kind."""
    for stage in stages:
        found = stage.next()
        if found is not None:
            return stage, *found
        if not ahead and not stage.done:
            return None
    return None


@contextmanager
def _pool(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of ``count`` worker processes of ``threads`` threads each.

    They end with this process, however it ends, and at once if it is stopped. After an error they finish their current
    tasks, whose results are kept.
    """
    context = multiprocessing.get_context("spawn")  # forked processes would share OpenMP's threads
    theirs, ours = context.Pipe(duplex=False)  # nothing is sent: the closing of our end is the signal
    with ours, ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(threads, theirs)) as pool:
        try:
            yield pool
        except BaseException as error:
            if not isinstance(error, Exception):
                ours.close()
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(threads: int, parent: Connection) -> None:
    exit_after(lambda: parent.poll(None))
    torch.set_num_threads(threads)
    commit()  # of the code that was just imported
