"""Progress of a training: a bar on a terminal, log lines elsewhere."""

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
    """``progress(iterable, description, total)`` passes the items on and shows how far the training is.

    On a terminal it draws a bar. Elsewhere it logs the description, at most once in ``EVERY`` seconds. ``title`` is
    logged before the first item: a step that is refused logs nothing.
    """

    EVERY = 10.0  # seconds between two log lines

    def __init__(self, title: str = "") -> None:
        self._title, self._last = title, time.perf_counter()

    def log_title(self) -> None:
        """Log the title unless it is logged already."""
        if self._title:
            log.info(self._title)
            self._title = ""

    def __call__(self, iterable: Iterable[T], description: str, total: int) -> Iterable[T]:
        self.log_title()
        if sys.stderr.isatty():
            yield from track(iterable, description, total=total, console=Console(stderr=True), transient=True)
            return
        if time.perf_counter() - self._last > self.EVERY:
            self._last = time.perf_counter()
            log.info(description)
        yield from iterable
