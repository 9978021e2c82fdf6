"""The lines that the commands of a ledger print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any

from delfast.errors import printable

if TYPE_CHECKING:  # imports sqlite3
    from delfast.ledger import Entry, Request, RequestDetails

COLUMNS = "{:>8}  {:<8}  {:>5}  {:>8}  {:<20}  {:<19}  {}"  # of fixed width, so that a list is printed while it is read
SHOWN_IDS = 20
LISTS = {  # lists of a payload that `show` counts
    "ids": "example",
    "requests": "request",
    "excluded": "open request",
    "references": "reference",
    "attempts": "attempt",
    "files": "file",
}


def print_line(line: str) -> None:
    """Print a line, whatever its text holds."""
    sys.stdout.write(printable(line) + "\n")


def counted(count: int, noun: str) -> str:
    """Return a count and its noun, in the plural unless it is one."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return a noun with its numbers, which follow each other."""
    first, last = numbers[0], numbers[-1]
    return f"{noun} {first}" if len(numbers) == 1 else f"{noun}s {first} to {last}"


def is_past(due: str) -> bool:
    """Return whether a due date (YYYY-MM-DD) has passed, by the clock of UTC."""
    return date.fromisoformat(due) < datetime.now(timezone.utc).date()


@contextmanager
def piped() -> Iterator[None]:
    """End quietly when the reader of standard output has enough, such as ``head``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


def kept_to_a_mask(events: Iterable[Entry]) -> bool:
    """Return whether the last attempt of a run that ended was kept to a mask, by the entries of the run."""
    from delfast.ledger.events import LOCALIZED

    localized, tried = set(), 0
    for entry in events:
        if entry.event == LOCALIZED:
            localized.add(entry.payload["attempt"])
        tried = max(tried, entry.payload.get("attempt", 0))
    return tried in localized


def row(request: Request, *, stopped: bool) -> str:
    """Return a line of ``list``; ``stopped``: no process is at work, so a run without a result was stopped."""
    run = "-" if request.run is None else request.run
    received = f"{request.time[:19].replace('T', ' ')}"
    reason = printable(request.reason or "")
    return COLUMNS.format(
        request.number,
        "stopped" if stopped and request.status == "running" else request.status,
        run,
        request.count,
        received,
        (request.due or "-") + (", overdue" if request.is_open and request.due and is_past(request.due) else ""),
        reason,
    ).rstrip()


def lines_of(details: RequestDetails) -> Iterator[str]:
    """Yield what ``show`` prints of a request."""
    request = details.request
    ids = details.ids if details.originals is None else details.originals
    more = f" and {len(ids) - SHOWN_IDS} more (--json prints all)" if len(ids) > SHOWN_IDS else ""
    kind = "HMACs" if details.originals is None else "examples"
    yield f"request {request.number}: {request.status}" + ("" if request.run is None else f" in run {request.run}")
    yield f"received: {request.time}"
    yield f"due: {request.due or '-'}"
    yield f"reason: {request.reason or '-'}"
    yield f"{kind} ({request.count}): {', '.join(ids[:SHOWN_IDS])}{more}"
    for entry in details.events:
        run = "" if entry.run is None else f" run {entry.run}"
        yield f"{entry.time}{run} {entry.event}: {_figures(entry)}".removesuffix(": ")
        if "checks" in entry.payload:
            yield from _checks(entry, [each for each in details.events if each.run == entry.run])


def _figures(entry: Entry) -> str:
    """Return the fields of a payload that are single values, and how many values some lists have."""
    parts = []
    for name, value in entry.payload.items():
        if isinstance(value, list):
            noun = LISTS.get(name)
            parts += [counted(len(value), noun)] if noun and value else []
        elif value is not None and not isinstance(value, dict):
            parts.append(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _checks(ended: Entry, events: Sequence[Entry]) -> Iterator[str]:
    """Yield the checks of a run that ended, as ``run`` prints them, and its advice."""
    from delfast.ledger import Check
    from delfast.ledger.evidence import table_lines

    checks = [Check(**each) for each in ended.payload["checks"]]
    lines = table_lines(checks, has_mask=kept_to_a_mask(events)) if checks else []
    for line in [*lines, *(f"- {each}" for each in ended.payload.get("advice", ()))]:
        yield f"    {line}"


def plain(details: RequestDetails) -> dict[str, Any]:
    """Return what ``show --json`` prints of a request."""
    events = [
        {"number": each.number, "time": each.time, "event": each.event, "run": each.run, "payload": each.payload}
        for each in details.events
    ]
    return {
        "request": asdict(details.request),
        "ids": list(details.ids),
        "originals": None if details.originals is None else list(details.originals),
        "events": events,
    }
