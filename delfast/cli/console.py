"""What a person sees: progress bars on a terminal, quiet log lines elsewhere, tables on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from delfast.errors import printable
from delfast.experiments.progress import log
from delfast.experiments.reports import METHOD_COLUMNS, method_rows, terminal_table, terminal_text
from delfast.mask import Mask


def start_log() -> None:
    """Send delfast's log lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("delfast: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class _Lines(logging.Formatter):
    """Every message on one line, without escape sequences: names in it come from files."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextmanager
def watching() -> Iterator[Callable[[str, int, int], None]]:
    """A function ``(what, done, of)`` that shows a bar with the time left on a terminal; elsewhere a line each time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, TaskID] = {}
        told: dict[str, int] = {}

        def watch(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)
            if bars.disable and of and told.get(what) != done:
                told[what] = done
                log.info(f"{what}: {done} of {of}")

        yield watch


def output() -> Console:
    """Where tables go: standard output, at least wide enough for them when it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_line(message: str) -> None:
    """One line on standard output: names in it are text, whatever they hold."""
    output().print(terminal_text(message), soft_wrap=True)


def print_methods(title: str, methods: dict[str, Any]) -> None:
    output().print(terminal_table(title, METHOD_COLUMNS, method_rows(methods)))


def print_mask(mask: Mask) -> None:
    rows = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.selected} of {row.total}",
            f"{row.channels} of {row.of_channels}",
        ]
        for row in mask.table()
    ]
    output().print(terminal_table("mask", ("parameter", "shape", "entries selected", "channels selected"), rows))
    print_line(f"{mask.selected} of {mask.total} parameters selected ({mask.fraction:.2%}), {mask.channels} channels")
