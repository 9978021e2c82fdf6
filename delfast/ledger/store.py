"""The store: one append-only table of entries in SQLite, where each entry carries the hash of the entry before it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from delfast.errors import InputError, one_line

DATABASE = "ledger.sqlite3"
FIRST = "0" * 64  # the hash before the first entry
WAIT = 60.0  # seconds that a writer waits for another one; an append takes milliseconds
BATCH = 100  # entries that a query returns at once: bounds the memory, and no query stays open while entries are added
LOWEST = -(2**63)  # below every number that SQLite has: an entry moved to a negative one is found too
COLUMNS = "number, time, event, run, payload, previous, hash"
_REFUSED = "BEGIN SELECT RAISE(ABORT, 'a ledger is only ever added to'); END"
SCHEMA = {
    "entries": (
        "CREATE TABLE entries (number INTEGER PRIMARY KEY, time TEXT NOT NULL, event TEXT NOT NULL, run INTEGER, "
        "payload TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)"
    ),
    "entries_by_event": "CREATE INDEX entries_by_event ON entries (event, number)",
    "entries_by_run": "CREATE INDEX entries_by_run ON entries (run, number) WHERE run IS NOT NULL",
    "entries_keep": f"CREATE TRIGGER entries_keep BEFORE DELETE ON entries {_REFUSED}",
    "entries_stay": f"CREATE TRIGGER entries_stay BEFORE UPDATE ON entries {_REFUSED}",
    # an INSERT OR REPLACE would delete the old row without the trigger of DELETE
    "entries_follow": (
        "CREATE TRIGGER entries_follow BEFORE INSERT ON entries "
        "WHEN NEW.number <= (SELECT coalesce(max(number), 0) FROM entries) "
        f"{_REFUSED}"
    ),
}
SYSTEM_ERRORS = {  # SQLite's text, since Python 3.10 does not pass its error code on
    "database or disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
}
# made once: json.dumps makes an encoder at each call
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_LIST = json.JSONEncoder(separators=(",", ":"))
Append = Callable[..., "Entry"]


class Entry(NamedTuple):
    """One entry of a ledger.

    Parameters
    ----------
    number : int
        Position in the ledger, from 1.
    time : str
        Time of the entry: UTC, ISO 8601, with microseconds.
    event : str
        Name of the event, such as "received".
    run : int or None
        Number of the run that the event belongs to.
    text : str
        The payload as it is stored: canonical JSON.
    previous : str
        Hash of the entry before, 64 hexadecimal digits; zeros for the first entry.
    hash : str
        Hash of this entry: SHA-256 over the canonical JSON of the list of all fields above.

    Examples
    --------
    >>> from delfast.ledger import Entry
    >>> entry = Entry(1, "2026-01-31T12:00:00.000000+00:00", "created", None, '{"job":"job.py"}', "0" * 64, "")
    >>> entry.payload["job"]
    'job.py'
    """

    number: int
    time: str
    event: str
    run: int | None
    text: str
    previous: str
    hash: str

    @property
    def payload(self) -> dict[str, Any]:
        """The payload's fields; InputError if they are no JSON, as after a change of the database."""
        try:
            fields = json.loads(self.text)
        except (TypeError, ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise InputError(
                f"entry {self.number} of the ledger was altered: its payload is no JSON; verify the ledger"
            )
        return fields


@dataclass(frozen=True)
class Verification:
    """Result of verifying a ledger.

    Parameters
    ----------
    count : int
        Number of entries, from the first, that hold.
    head : str
        Hash of the last entry that holds.
    problems : tuple of str
        One line for each problem found; empty if the ledger holds.

    Examples
    --------
    >>> from delfast.ledger import Verification
    >>> Verification(0, "0" * 64, ("entry 1 is missing",)).holds
    False
    """

    count: int
    head: str
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def canonical(value: object) -> str:
    """Return ``value`` as JSON in its one form: sorted keys, no spaces, UTF-8 text, finite numbers."""
    try:
        text = _CANONICAL.encode(value)
        text.encode("utf-8")  # half of a surrogate pair has no UTF-8
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected plain JSON values for a ledger, got others ({one_line(error)})") from None
    return text


def entry_hash(number: int, time: str, event: str, run: int | None, text: str, previous: str) -> str:
    """Return the SHA-256 (hex) over the canonical JSON of an entry's other fields."""
    content = _LIST.encode([number, time, event, run, text, previous])
    return hashlib.sha256(content.encode()).hexdigest()


class Store:
    """The entries of one ledger. Not shared between threads or across a fork: open another one there."""

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / DATABASE
        if not self.path.is_file():
            raise InputError(f"expected a ledger at '{directory}', found no {DATABASE}; make one: delfast ledger init")
        with _errors(self.path):
            self._connection = _connect(self.path, "rw" if _is_writable(self.path) else "ro")
        try:
            self._rows("PRAGMA synchronous = FULL")  # a commit outlives a power cut
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, directory: Path) -> Store:
        """Make an empty store in an existing directory."""
        path = Path(directory) / DATABASE
        with _errors(path):
            connection = _connect(path, "rwc")
            try:
                connection.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not wait for each other
                for statement in SCHEMA.values():
                    connection.execute(statement)
            finally:
                connection.close()
        return cls(directory)

    def close(self) -> None:
        """Close the database; the last process to do so folds the write-ahead log into its file."""
        self._connection.close()

    # ---- writing

    def append(self, event: str, payload: Mapping[str, Any], run: int | None = None) -> Entry:
        """Append one entry, and return when it is on the disk."""
        with self.writing() as append:
            return append(event, payload, run)

    @contextmanager
    def writing(self) -> Iterator[Append]:
        """Yield a function that appends entries, with ``append``'s arguments: all of them or, after an error, none.

        Other writers wait meanwhile, so what is read inside the context stays true until its end.
        """
        self._rows("BEGIN IMMEDIATE")
        try:
            yield _Appender(self._rows)
            self._rows("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite ends it itself after some failures of the disk
                self._rows("ROLLBACK")
            raise

    # ---- reading

    def entries(self, event: str | None = None, run: int | None = None, *, after: int = LOWEST) -> Iterator[Entry]:
        """Yield the entries after the number ``after``, in order; only those of ``event`` and of ``run`` where given.

        Entries that are appended meanwhile are yielded too.
        """
        chosen = {name: value for name, value in (("event", event), ("run", run)) if value is not None}
        conditions = " AND ".join(["number > ?", *(f"{name} = ?" for name in chosen)])
        query = f"SELECT {COLUMNS} FROM entries WHERE {conditions} ORDER BY number LIMIT {BATCH}"
        while True:
            rows = self._rows(query, (after, *chosen.values()))
            for row in rows:
                yield Entry._make(row)
            if len(rows) < BATCH:
                return
            after = rows[-1][0]

    def last(self, event: str | None = None) -> Entry | None:
        """Return the newest entry, or the newest of an event; None without one."""
        where, values = ("", ()) if event is None else ("WHERE event = ? ", (event,))
        rows = self._rows(f"SELECT {COLUMNS} FROM entries {where}ORDER BY number DESC LIMIT 1", values)
        return Entry._make(rows[0]) if rows else None

    def nth(self, event: str, position: int) -> Entry | None:
        """Return the entry at a position, from 1, among those of an event; None past the last."""
        query = f"SELECT {COLUMNS} FROM entries WHERE event = ? ORDER BY number LIMIT 1 OFFSET ?"
        rows = self._rows(query, (event, position - 1))
        return Entry._make(rows[0]) if rows else None

    @property
    def head(self) -> str:
        """Hash of the newest entry, which stands for the whole ledger up to it."""
        last = self.last()
        return FIRST if last is None else last.hash

    # ---- verifying

    def verify(self, head: str | None = None, seen: Callable[[Entry], str | None] = lambda entry: None) -> Verification:
        """Check the whole chain in order, and that it passes through the hash ``head``.

        ``seen`` gets every entry whose hash holds, and returns a problem or None.
        """
        problems = self._schema_problems()
        passed, last, previous = head is None, 0, FIRST
        try:
            for entry in self.entries():
                problem = chain_problem(entry, last, previous) or seen(entry)
                if problem is not None:
                    problems.append(problem)
                    break
                last, previous = entry.number, entry.hash
                passed = passed or previous == head
            else:
                if not passed:
                    problems.append(
                        f"no entry has the hash {head}: the ledger was rewritten or cut since that head was printed"
                    )
        except InputError as error:  # a damaged page
            problems.append(f"entry {last + 1} or a later one cannot be read ({one_line(error)})")
        return Verification(last, previous, tuple(problems))

    def _schema_problems(self) -> list[str]:
        """Compare the table, its indexes and its triggers with those that ``create`` makes, and check the file."""
        try:
            found = dict(self._rows("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
            damage = self._rows("PRAGMA integrity_check(1)")[0][0]
        except InputError as error:
            return [str(error)]
        problems = [
            f"the database's '{name}' is not what a ledger has: it was altered"
            for name in sorted(found.keys() | SCHEMA.keys())
            if found.get(name) != SCHEMA.get(name)
        ]
        return problems if damage == "ok" else [*problems, f"the database is damaged ({damage})"]

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Execute one statement, and return its rows."""
        with _errors(self.path):
            return self._connection.execute(statement, values).fetchall()


class _Appender:
    """Append entries inside a transaction, after the newest one at its beginning."""

    def __init__(self, execute: Callable[..., list[Any]]) -> None:
        self._execute = execute
        rows = execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1")
        self._number: int = rows[0][0] if rows else 0
        self._previous: str = rows[0][1] if rows else FIRST

    def __call__(self, event: str, payload: Mapping[str, Any], run: int | None = None) -> Entry:
        time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        fields = (self._number + 1, time, event, run, canonical(dict(payload)), self._previous)
        entry = Entry(*fields, entry_hash(*fields))
        self._execute(f"INSERT INTO entries ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", entry)
        self._number, self._previous = entry.number, entry.hash
        return entry


def chain_problem(entry: Entry, last: int, previous: str) -> str | None:
    """Return why an entry cannot follow entry ``last`` with the hash ``previous``; None if it can."""
    if entry.number != last + 1:
        return f"entry {last + 1} is missing: entry {entry.number} comes next"
    if entry.previous != previous:
        return f"entry {entry.number} does not follow the entry before it: an entry was edited, removed or moved"
    try:
        right = entry_hash(entry.number, entry.time, entry.event, entry.run, entry.text, entry.previous)
    except TypeError:  # a column holds bytes
        right = None
    return None if entry.hash == right else f"entry {entry.number} is not as it was written: its hash is another"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open a database in autocommit mode; "ro" is for a directory where the write-ahead log cannot be made."""
    immutable = "&immutable=1" if mode == "ro" and not path.with_name(f"{path.name}-wal").exists() else ""
    uri = f"file:{quote(os.fspath(path.absolute()))}?mode={mode}{immutable}"
    connection = sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)
    # text that is no UTF-8 is read as text that no entry can have, so that ``verify`` names its entry
    connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    return connection


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into those of the system, or InputError for a file that is no ledger."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = one_line(error)
        for start, code in SYSTEM_ERRORS.items():
            if text.startswith(start):
                raise OSError(code, f"{os.strerror(code)}; the ledger is as it was", str(path)) from error
        if "locked" in text:
            message = f"another process has been writing for {WAIT:g} seconds; try again"
            raise OSError(errno.EBUSY, message, str(path)) from error
        raise InputError(f"'{path}' is no ledger or is damaged ({text}); restore it from a backup") from error
    except UnicodeDecodeError as error:  # SQLite quotes damaged text in its message
        raise InputError(f"'{path}' is no ledger or is damaged; restore it from a backup") from error
