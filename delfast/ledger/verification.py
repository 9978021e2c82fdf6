"""Verification of a whole ledger: its entries, the numbers of its requests, and the files that it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delfast.errors import InputError
from delfast.ledger.artefacts import Recorded
from delfast.ledger.events import CREATED
from delfast.ledger.requests import Numbering
from delfast.ledger.store import FIRST, Entry, Store, Verification, chain_problem

DIGITS = 64  # hexadecimal, of a SHA-256


def verify_ledger(store: Store, head: str | None = None, *, files: bool = True) -> Verification:
    """Check every entry of a store in order, that the chain passes through ``head``, and the recorded files."""
    wanted = None if head is None else _hash(head)
    recorded, numbering = Recorded(), Numbering()

    def seen(entry: Entry) -> str | None:
        return numbering.take(entry) or recorded.take(entry)

    found = store.verify(wanted, seen)
    problems = recorded.problems(store.path.parent) if files else ()
    return Verification(found.count, found.head, (*found.problems, *problems))


def verify_directory(path: Path, head: str | None = None, *, files: bool = True) -> Verification:
    """Check the ledger in a directory, also one whose first entry was altered, which ``Ledger.open`` refuses."""
    store = Store(path)
    try:
        return verify_ledger(store, head, files=files)
    finally:
        store.close()


def creation(store: Store) -> dict[str, Any]:
    """Return the payload of the first entry; InputError if it was altered, so that nothing is read from that ledger."""
    first = store.nth(CREATED, 1)
    problem = "it has no entry of its creation" if first is None else chain_problem(first, 0, FIRST)
    if first is None or problem is not None:
        raise InputError(f"the ledger '{store.path.parent}' was altered: {problem}; restore it from a backup")
    return first.payload


def _hash(text: str) -> str:
    lowered = text.strip().lower()
    if len(lowered) != DIGITS or not set(lowered) <= set("0123456789abcdef"):
        raise InputError(f"expected a head of {DIGITS} hexadecimal digits, got '{text}'; copy it from a report")
    return lowered
