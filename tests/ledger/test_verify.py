"""Verification: every edited, removed, inserted or moved entry is found, and a rewritten ledger by an earlier head."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from delfast.errors import InputError
from delfast.ledger import Ledger
from delfast.ledger.store import DATABASE, FIRST, SCHEMA, Store, entry_hash
from tests.ledger.small import altered, fill

COUNT = 8  # entries of ``fill``
TEXTS = ("time", "event", "payload", "previous", "hash")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger's directory, to copy."""
    directory = tmp_path_factory.mktemp("original")
    store = Store.create(directory)
    fill(store)
    store.close()
    return directory


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "ledger"


def fresh(original: Path, scratch: Path) -> Path:
    """Return the database of a new copy."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(original, scratch)
    return scratch / DATABASE


def problem(path: Path, head: str | None = None) -> str | None:
    """Return the first problem that ``verify`` finds; what comes after it is not looked at."""
    store = Store(path.parent)
    try:
        result = store.verify(head)
    finally:
        store.close()
    assert len(result.problems) <= 1 and result.holds == (not result.problems)
    return result.problems[0] if result.problems else None


def rows(path: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT * FROM entries ORDER BY number").fetchall()
    finally:
        connection.close()


def test_a_ledger_as_it_was_written_holds(original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    with altered(path):
        pass  # the triggers are dropped and made again
    assert problem(path) is None and len(rows(path)) == COUNT
    for row in rows(path):
        assert problem(path, str(row[-1])) is None  # each was the head once
    assert "no entry has the hash" in (problem(path, FIRST) or "")


@given(data=st.data())
@settings(max_examples=150)
def test_every_edited_byte_is_found(data: st.DataObject, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    number, column = data.draw(st.integers(1, COUNT)), data.draw(st.sampled_from(TEXTS))
    with altered(path) as connection:
        query = f"SELECT CAST({column} AS BLOB) FROM entries WHERE number = ?"
        content = bytearray(connection.execute(query, (number,)).fetchone()[0])
        where = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("change", "insert", "remove", "swap")))
        before = bytes(content)
        if kind == "remove":
            del content[where]
        elif kind == "insert":
            content.insert(where, data.draw(st.integers(0, 255)))
        elif kind == "change":
            content[where] = data.draw(st.integers(0, 255))
        else:
            content[where - 1], content[where] = content[where], content[where - 1]
        assume(bytes(content) != before)
        connection.execute(f"UPDATE entries SET {column} = CAST(? AS TEXT) WHERE number = ?", (bytes(content), number))
    found = problem(path)
    assert found is not None and found.startswith(f"entry {number} "), found


@pytest.mark.parametrize("column", TEXTS)
def test_text_that_became_bytes_is_found(column: str, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    with altered(path) as connection:  # queries for text would pass over it
        connection.execute(f"UPDATE entries SET {column} = CAST({column} AS BLOB) WHERE number = 3")
    assert (problem(path) or "").startswith("entry 3 ")


@given(number=st.integers(1, COUNT), run=st.none() | st.integers(-3, 3) | st.floats(0.5, 1.5) | st.just("x"))
@settings(max_examples=30)
def test_another_run_is_found(number: int, run: object, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    before = rows(path)
    with altered(path) as connection:
        connection.execute("UPDATE entries SET run = ? WHERE number = ?", (run, number))
    assume(rows(path) != before)
    assert (problem(path) or "").startswith(f"entry {number} ")


@given(removed=st.sets(st.integers(1, COUNT), min_size=1))
@settings(max_examples=60)
def test_every_removed_entry_is_found(removed: set[int], original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    head = str(rows(path)[-1][-1])
    with altered(path) as connection:
        for number in removed:
            connection.execute("DELETE FROM entries WHERE number = ?", (number,))
    first, is_cut = min(removed), removed == set(range(min(removed), COUNT + 1))
    if is_cut:  # the rest is a whole chain: an earlier state of the ledger
        assert problem(path) is None and "no entry has the hash" in (problem(path, head) or "")
    else:
        assert (problem(path) or "").startswith(f"entry {first} is missing")
        assert (problem(path, head) or "").startswith(f"entry {first} is missing")


@given(data=st.data())
@settings(max_examples=60)
def test_every_inserted_entry_is_found(data: st.DataObject, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    source = data.draw(st.integers(1, COUNT))
    number = data.draw(st.sampled_from((-(2**62), -1, 0, COUNT + 1, COUNT + 2, 2**62)) | st.integers(1, COUNT))
    with altered(path) as connection:
        is_copy = source == number  # of the entry that moves up, which is then the first one at a wrong place
        if 1 <= number <= COUNT:  # the later ones move up
            for later in range(COUNT, number - 1, -1):
                connection.execute("UPDATE entries SET number = number + 1 WHERE number = ?", (later,))
            source += source >= number
        copied = "time, event, run, payload, previous, hash"
        connection.execute(
            f"INSERT INTO entries (number, {copied}) SELECT ?, {copied} FROM entries WHERE number = ?", (number, source)
        )
    found = problem(path) or ""
    expected = "entry 1 is missing" if number < 1 else f"entry {min(number, COUNT + 1) + is_copy} "
    assert found.startswith(expected), found


@given(order=st.permutations(range(1, COUNT + 1)))
@settings(max_examples=40)
def test_every_moved_entry_is_found(order: list[int], original: Path, scratch: Path) -> None:
    assume(order != sorted(order))
    path = fresh(original, scratch)
    with altered(path) as connection:
        for number in range(1, COUNT + 1):
            connection.execute("UPDATE entries SET number = -number WHERE number = ?", (number,))
        for target, number in enumerate(order, start=1):
            connection.execute("UPDATE entries SET number = ? WHERE number = ?", (target, -number))
    first = next(target for target, number in enumerate(order, start=1) if target != number)
    assert (problem(path) or "").startswith(f"entry {first} ")


def rewrite(path: Path, number: int, payload: str) -> None:
    """Change a payload, and every hash from there on, as somebody does who knows how hashes are made."""
    with altered(path) as connection:
        previous = FIRST
        for row in rows(path):
            text = payload if row[0] == number else row[4]
            fields = (row[0], row[1], row[2], row[3], text, previous)
            previous = entry_hash(*fields)  # type: ignore[arg-type]
            statement = "UPDATE entries SET payload = ?, previous = ?, hash = ? WHERE number = ?"
            connection.execute(statement, (*fields[-2:], previous, row[0]))


@pytest.mark.parametrize("number", [1, 4, COUNT])
def test_a_rewritten_ledger_is_found_by_an_earlier_head_alone(number: int, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    heads = [str(row[-1]) for row in rows(path)]
    rewrite(path, number, '{"request":1}')
    assert problem(path) is None  # a whole chain: the ledger itself cannot show it
    assert all("no entry has the hash" in (problem(path, head) or "") for head in heads[number - 1 :])
    assert all(problem(path, head) is None for head in heads[: number - 1])  # printed before what was changed
    assert problem(path, str(rows(path)[-1][-1])) is None


def test_a_rewriting_that_changes_nothing_holds(original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    before = rows(path)
    rewrite(path, 4, str(before[3][4]))
    assert rows(path) == before and problem(path, str(before[-1][-1])) is None


@pytest.mark.parametrize("name", [name for name in SCHEMA if name != "entries"])
def test_a_missing_trigger_or_index_is_found(name: str, original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    connection = sqlite3.connect(path)
    connection.execute(f"DROP {SCHEMA[name].split()[1]} {name}")
    connection.close()
    assert problem(path) == f"the database's '{name}' is not what a ledger has: it was altered"


def test_another_table_is_found(original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text)")
    connection.close()
    assert "'notes' is not what a ledger has" in (problem(path) or "")


@pytest.mark.long
def test_a_flipped_bit_of_the_file_changes_no_entry_unfound(original: Path, scratch: Path) -> None:
    path = fresh(original, scratch)
    before, content = rows(path), path.read_bytes()
    draw = random.Random(0)
    found = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            holds = problem(path) is None
        except (InputError, OSError, AssertionError):  # not opened, or several problems
            holds = False
        if holds:
            assert rows(path) == before  # the bit is in a part of a page that is not used
        found += not holds
        for name in (f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (path.parent / name).unlink(missing_ok=True)
    assert found > 50


def test_a_ledgers_requests_are_numbered_without_a_gap(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    fill(store)
    store.append("received", {"request": 5, "ids": ["x"], "count": 1, "reason": None, "due": None})
    with Ledger.open(tmp_path) as ledger:
        assert ledger.verify().problems == ("entry 9 is not of request 4, which comes next",)
