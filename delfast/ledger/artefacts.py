"""Files that a ledger's entries record, and whether they still are as recorded.

An artefact in a payload, at any depth, is {"file": path relative to the ledger, with "/", "digest": SHA-256 (hex) of
the content}. The artefacts of a "purged" entry are those that it removes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from delfast.ledger.events import PURGED
from delfast.ledger.store import Entry

MODELS, RUNS, REFERENCE_MODELS = "models", "runs", "references"  # folders of the ledger
CHUNK = 1 << 20  # bytes read at once


def artefact(ledger: Path, path: Path) -> dict[str, str]:
    """Return the record of a file of the ledger, for a payload."""
    return {"file": path.relative_to(ledger).as_posix(), "digest": digest_file(path)}


def digest_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's content."""
    total = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def is_inside(name: str) -> bool:
    """Return whether a recorded path stays in the ledger's directory."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


class Recorded:
    """Files that the entries given so far record, except those purged since: path -> digest."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.purged: set[str] = set()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Recorded:
        """Return the files of these entries, in their order."""
        recorded = cls()
        for entry in entries:
            recorded.take(entry)
        return recorded

    def take(self, entry: Entry) -> str | None:
        """Take up an entry's artefacts; return a problem if the path of one leads out of the ledger."""
        if '"file":' not in entry.text:  # most entries are requests, which need not be parsed
            return None
        for name, digest in _artefacts(entry.payload):
            if not is_inside(name):
                return f"entry {entry.number} records the file '{name}', which is outside the ledger"
            if entry.event == PURGED:
                self.digests.pop(name, None)
                self.purged.add(name)
            else:
                self.digests[name] = digest
                self.purged.discard(name)
        return None

    def others(self, ledger: Path, *folders: str) -> Iterator[str]:
        """Yield the files in these folders of the ledger that are not among the recorded ones."""
        for folder in folders:
            found = [Path(at, name) for at, _, names in os.walk(ledger / folder) for name in names]
            for path in sorted(found):
                name = path.relative_to(ledger).as_posix()
                if name not in self.digests:
                    yield name

    def problems(self, ledger: Path) -> Iterator[str]:
        """Yield a line for each file that is missing or has another content, or that is there after its purge."""
        for name in sorted(self.purged):
            if os.path.lexists(ledger / name):
                yield f"the file '{name}' was purged and is there again; delete it by `delfast ledger purge`"
        for name, digest in sorted(self.digests.items()):
            try:
                found = digest_file(ledger / name)
            except OSError as error:
                yield f"the recorded file '{name}' cannot be read ({error.strerror})"
                continue
            if found != digest:
                yield f"the recorded file '{name}' is not as it was written: its digest is {found}, not {digest}"


def discard_unrecorded(ledger: Path, entries: Iterable[Entry], folder: str) -> None:
    """Delete the files in a folder of the ledger that none of these entries records."""
    for name in list(Recorded.of(entries).others(ledger, folder)):
        (ledger / name).unlink()


def _artefacts(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        if isinstance(value.get("file"), str) and isinstance(value.get("digest"), str):
            yield value["file"], value["digest"]
        for each in value.values():
            yield from _artefacts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _artefacts(each)
