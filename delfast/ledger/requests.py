"""Forget requests: their form when they come in, and their state, derived from the entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from delfast.errors import InputError
from delfast.ledger.identifiers import checked
from delfast.ledger.store import Entry, Store

CREATED, RECEIVED, STARTED, ACCEPTED, REJECTED = "created", "received", "started", "accepted", "rejected"
PENDING, RUNNING = "pending", "running"  # states beside ACCEPTED and REJECTED
FIELDS = ("ids", "reason", "due")


@dataclass(frozen=True)
class Request:
    """One forget request and its state.

    Parameters
    ----------
    number : int
        Number of the request, from 1.
    time : str
        Time at which it was added: UTC, ISO 8601.
    count : int
        Number of examples that it names.
    reason : str or None
        Free text given with it.
    due : str or None
        Date by which it is to be done: ISO 8601, YYYY-MM-DD.
    status : str
        "pending": no run has taken it up. "running": the newest run that took it up has no result yet, since it runs or
        was stopped. "accepted" or "rejected": the result of that run.
    run : int or None
        Number of the newest run that took it up.

    Examples
    --------
    >>> from delfast.ledger import Request
    >>> Request(1, "2026-01-31T12:00:00.000000+00:00", 10, None, "2026-03-01", "rejected", 1).is_open
    True
    """

    number: int
    time: str
    count: int
    reason: str | None
    due: str | None
    status: str
    run: int | None

    @property
    def is_open(self) -> bool:
        """Whether the request still has to be carried out: everything except "accepted"."""
        return self.status != ACCEPTED


@dataclass(frozen=True)
class RequestDetails:
    """One forget request with all that the ledger holds about it.

    Parameters
    ----------
    request : Request
        The request and its state.
    ids : tuple of str
        Its identifiers as they are stored: as text, or as HMACs (hexadecimal).
    originals : tuple of str or None
        The identifiers as text, in the order of ``ids``; None where the ledger was opened without the job or the key.
    events : tuple of Entry
        The entry that received it, then the entries of every run that took it up, in order.

    Examples
    --------
    >>> from delfast.ledger import Request, RequestDetails
    >>> request = Request(1, "2026-01-31T12:00:00.000000+00:00", 1, None, None, "pending", None)
    >>> RequestDetails(request, ("17",), ("17",), ()).ids
    ('17',)
    """

    request: Request
    ids: tuple[str, ...]
    originals: tuple[str, ...] | None
    events: tuple[Entry, ...]


def read_request(fields: Mapping[str, Any]) -> tuple[list[str], str | None, str | None]:
    """Return a new request's identifiers, reason and due date, checked."""
    unknown = [name for name in fields if name not in FIELDS]
    if unknown or "ids" not in fields:
        got = ", ".join(map(repr, fields)) or "none"
        raise InputError(f"expected the fields 'ids' and optionally 'reason' and 'due' of a request, got {got}")
    ids = fields["ids"]
    if isinstance(ids, Mapping) or not isinstance(ids, Iterable):
        raise InputError(f"expected 'ids' as a list of identifiers, got {ids!r}; put them in a list")
    return checked(ids), _reason(fields.get("reason")), _due(fields.get("due"))


def _reason(text: object) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"expected the reason as text, got {text!r}; leave it out or write one")
    return text.strip()


def _due(value: object) -> str | None:
    if value is None:
        return None
    try:
        return (date.fromisoformat(value) if isinstance(value, str) else _plain_date(value)).isoformat()
    except (TypeError, ValueError):
        raise InputError(f"expected the due date as YYYY-MM-DD (ISO 8601), got {value!r}; write it so") from None


def _plain_date(value: object) -> date:
    if type(value) is not date:  # a datetime is a date with a time of day, which would be lost
        raise TypeError
    return value


# ---- derived from the entries


def requests(store: Store) -> Iterator[Request]:
    """Yield every request with its state, in order."""
    states = _states(store)
    for entry in store.entries(RECEIVED):
        yield _request(entry, states)


def request(store: Store, number: int) -> tuple[Request, Entry] | None:
    """Return a request and the entry that received it; None without one of that number."""
    entry = store.nth(RECEIVED, number) if number >= 1 else None
    return None if entry is None else (_request(entry, _states(store)), entry)


def runs_of(store: Store, number: int) -> list[int]:
    """Return the numbers of the runs that took up a request, in order."""
    return [run for run, taken in _runs(store) if number in taken]


def stored_ids(store: Store) -> Iterator[tuple[int, list[str]]]:
    """Yield each request's number and its identifiers as they are stored."""
    for entry in store.entries(RECEIVED):
        payload = entry.payload
        yield payload["request"], payload["ids"]


class Numbering:
    """Check that requests are numbered from 1 without a gap."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, entry: Entry) -> str | None:
        """Take up an entry; return a problem if it receives a request of a number that does not come next."""
        if entry.event != RECEIVED:
            return None
        self._last += 1
        if entry.text.endswith(f'"request":{self._last}}}'):  # the last key of canonical JSON: nothing is parsed
            return None
        return f"entry {entry.number} is not of request {self._last}, which comes next"


def _runs(store: Store) -> Iterator[tuple[int, list[int]]]:
    for entry in store.entries(STARTED):
        if entry.run is not None:
            yield entry.run, entry.payload["requests"]


def _states(store: Store) -> dict[int, tuple[str, int]]:
    """Return the status and the run of every request that a run has taken up."""
    results = {entry.run: event for event in (ACCEPTED, REJECTED) for entry in store.entries(event)}
    return {number: (results.get(run, RUNNING), run) for run, taken in _runs(store) for number in taken}


def _request(entry: Entry, states: Mapping[int, tuple[str, int]]) -> Request:
    payload = entry.payload
    status, run = states.get(payload["request"], (PENDING, None))
    return Request(
        number=payload["request"],
        time=entry.time,
        count=payload["count"],
        reason=payload["reason"],
        due=payload["due"],
        status=status,
        run=run,
    )
