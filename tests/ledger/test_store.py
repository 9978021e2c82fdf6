"""The store: entries that are only added, transactions that happen whole or not at all, and errors in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from delfast.errors import InputError
from delfast.ledger import store as module
from delfast.ledger.store import DATABASE, FIRST, Entry, Store
from tests.ledger.small import fill


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path)


def test_an_entry_carries_the_hash_of_the_entry_before_it(store: Store) -> None:
    assert store.head == FIRST and list(store.entries()) == [] and store.last() is None
    first, second = store.append("created", {"b": 1, "a": [1.5, None]}), store.append("started", {"ä": "ß"}, 1)
    assert (first.number, first.previous, first.text) == (1, "0" * 64, '{"a":[1.5,null],"b":1}')
    assert (second.number, second.previous, second.run, second.text) == (2, first.hash, 1, '{"ä":"ß"}')
    for entry in (first, second):
        fields = [entry.number, entry.time, entry.event, entry.run, entry.text, entry.previous]
        text = json.dumps(fields, separators=(",", ":"))  # the definition, written again
        assert entry.hash == hashlib.sha256(text.encode("ascii")).hexdigest()
        age = datetime.now(timezone.utc) - datetime.fromisoformat(entry.time)
        assert timedelta(0) <= age < timedelta(minutes=1) and len(entry.time) == len("2026-01-31T12:00:00.000000+00:00")
    assert store.head == second.hash and second.payload == {"ä": "ß"}


def test_entries_are_found_by_event_and_by_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(module, "BATCH", 3)  # several queries, and a last one that is full
    everything = list(store.entries())
    assert [entry.number for entry in everything] == list(range(1, 9))
    for event in ("received", "started", "absent"):
        assert list(store.entries(event)) == [entry for entry in everything if entry.event == event]
    for run in (1, 2, 3):
        assert list(store.entries(run=run)) == [entry for entry in everything if entry.run == run]
    assert [entry.number for entry in store.entries("started", 2)] == [7]
    assert [entry.number for entry in store.entries(run=2, after=7)] == [8]
    assert [entry.number for entry in store.entries(after=2)] == [3, 4, 5, 6, 7, 8]
    assert store.last() == everything[-1] and store.last("received") == everything[3] and store.last("absent") is None
    assert store.nth("received", 2) == everything[2] and store.nth("received", 4) is None


def test_entries_that_are_appended_meanwhile_are_yielded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    monkeypatch.setattr(module, "BATCH", 2)
    seen = []
    for entry in store.entries():
        if entry.number == 1:
            store.append("purged", {})
        seen.append(entry.event)
    assert len(seen) == 9 and seen[-1] == "purged"


def test_nothing_is_edited_removed_or_replaced(store: Store) -> None:
    fill(store)
    before = list(store.entries())
    columns = "(number, time, event, payload, previous, hash)"
    for statement in (
        "UPDATE entries SET payload = '{}' WHERE number = 2",
        "UPDATE entries SET number = 99 WHERE number = 8",
        "DELETE FROM entries WHERE number = 8",
        "DELETE FROM entries",
        f"INSERT OR REPLACE INTO entries {columns} VALUES (3, 't', 'e', '{{}}', 'p', 'h')",
        f"INSERT INTO entries {columns} VALUES (-1, 't', 'e', '{{}}', 'p', 'h')",
    ):
        with sqlite3.connect(store.path) as connection, pytest.raises(sqlite3.IntegrityError, match="only ever added"):
            connection.execute(statement)
        connection.close()
    assert list(store.entries()) == before


def test_a_transaction_happens_whole_or_not_at_all(store: Store) -> None:
    fill(store)
    before = list(store.entries())
    for error in (RuntimeError, KeyboardInterrupt, InputError):
        with pytest.raises(error), store.writing() as append:
            append("received", {"request": 4})
            append("received", {"request": 5})
            raise error
    with pytest.raises(InputError, match="plain JSON"), store.writing() as append:
        append("received", {"request": 4})
        append("received", {"loss": float("nan")})
    assert list(store.entries()) == before and store.verify().holds
    with store.writing() as append:
        appended = [append("received", {"request": number}) for number in (4, 5)]
    assert list(store.entries()) == [*before, *appended] and store.verify().holds


@pytest.mark.parametrize("value", [float("inf"), "\ud800", {1, 2}, Path(), b"x"], ids=repr)
def test_a_payload_is_plain_json(store: Store, value: object) -> None:
    with pytest.raises(InputError, match="expected plain JSON values") as caught:
        store.append("audited", {"value": [value]})
    assert "\n" not in str(caught.value) and list(store.entries()) == []


def test_a_full_disk_leaves_the_ledger_as_it_was(store: Store) -> None:
    fill(store)
    before = list(store.entries())
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match=f"No space left on device; the ledger is as it was: '.*{DATABASE}'") as caught:
        store.append("audited", {"text": "x" * 100_000})
    assert caught.value.errno == errno.ENOSPC and list(store.entries()) == before
    with pytest.raises(OSError, match="No space left"), store.writing() as append:
        append("received", {"request": 4})
        append("audited", {"text": "x" * 100_000})
    assert list(store.entries()) == before and store.verify().holds
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.append("audited", {"text": "x" * 100_000})
    assert store.verify().count == len(before) + 1 and store.verify().holds


def test_a_writer_that_waits_too_long_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.05)
    other = Store(store.path.parent)
    with store.writing() as append:
        with pytest.raises(OSError, match="another process has been writing") as caught:
            other.append("received", {})
        append("received", {})
    assert caught.value.errno == errno.EBUSY
    other.append("received", {})
    assert other.verify().count == 2 and list(store.entries()) == list(other.entries())


def test_a_ledger_that_cannot_be_written_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    entries = list(store.entries())
    store.close()
    monkeypatch.setattr(module, "_is_writable", lambda path: False)
    files = {path: path.read_bytes() for path in store.path.parent.iterdir()}
    reader = Store(store.path.parent)
    assert list(reader.entries()) == entries and reader.verify(entries[3].hash).holds
    with pytest.raises(OSError, match="Permission denied") as caught:
        reader.append("received", {})
    assert caught.value.errno == errno.EACCES
    reader.close()
    assert {path: path.read_bytes() for path in store.path.parent.iterdir()} == files


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a ledger at '.*', found no ledger.sqlite3"):
        Store(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="is no ledger or is damaged"):
        Store(tmp_path)
    with pytest.raises(OSError, match="Permission denied"):
        Store.create(tmp_path / "absent")
    os.truncate(tmp_path / DATABASE, 0)
    with pytest.raises(InputError, match="is no ledger or is damaged"):
        Store(tmp_path).append("created", {})


def test_an_entry_is_a_plain_tuple() -> None:
    entry = Entry(1, "t", "e", None, '{"a":1}', FIRST, FIRST)
    assert entry.payload == {"a": 1} and tuple(entry) == (1, "t", "e", None, '{"a":1}', FIRST, FIRST)
