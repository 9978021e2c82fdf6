"""Progress of a long step: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
log = logging.getLogger("delfast")


class Progress:
    """``progress(iterable, description, total)``: a bar on a terminal; elsewhere a line where ``EVERY`` has passed."""

    EVERY = 10.0  # seconds between two log lines

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self, iterable: Iterable[T], description: str, total: int) -> Iterable[T]:
        if sys.stderr.isatty():
            yield from track(iterable, description, total=total, console=Console(stderr=True), transient=True)
            return
        if time.perf_counter() - self._last > self.EVERY:
            self._last = time.perf_counter()
            log.info(description)
        yield from iterable


progress = Progress()
