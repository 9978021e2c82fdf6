"""Terminal output: progress bars or log lines on standard error, tables on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from delfast.errors import printable

if TYPE_CHECKING:
    from delfast.mask import Mask

log = logging.getLogger("delfast")


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
    """A function ``(what, done, of)`` that draws a bar with the time left on a terminal, and logs a line elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, TaskID] = {}
        logged: dict[str, int] = {}

        def watch(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done)
            if bars.disable and of and logged.get(what) != done:
                logged[what] = done
                log.info(f"{what}: {done} of {of}")

        yield watch


def output() -> Console:
    """The console of standard output, at least wide enough for tables where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_line(message: str) -> None:
    """Print one line; names in it are shown as text, whatever they hold."""
    from delfast.experiments.reports import terminal_text

    output().print(terminal_text(message), soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; names in it are shown as text, whatever they hold."""
    from delfast.experiments.reports import terminal_table

    output().print(terminal_table(title, columns, rows))


def print_methods(title: str, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row of metrics for each method."""
    from delfast.experiments.reports import method_table

    print_table(title, *method_table(methods))


def print_mask(mask: Mask) -> None:
    """Print what the mask selects of each parameter, and in all."""
    rows = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            f"{row.selected} of {row.total}",
            f"{row.channels} of {row.channel_count}",
        ]
        for row in mask.table()
    ]
    print_table("mask", ("parameter", "shape", "elements selected", "channels selected"), rows)
    print_line(f"{mask.selected} of {mask.total} elements selected ({mask.fraction:.2%}), {mask.channels} channels")
