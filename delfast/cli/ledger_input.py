"""The files that ``ledger add`` reads: identifiers, one a line, or requests, one JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from delfast.errors import InputError, one_line


def _text(path: Path) -> str:
    """Return the text of a file, or of standard input for "-"; UTF-8, with or without a byte order mark."""
    from delfast.files import read_text, reason

    try:
        return sys.stdin.buffer.read().decode("utf-8-sig") if str(path) == "-" else read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{path}' ({reason(error)}); pass a text file or -") from None


def read_ids(path: Path) -> tuple[list[str], dict[str, int]]:
    """Return the identifiers of a file, one a line, and the line of each."""
    stripped = ((number, line.strip()) for number, line in enumerate(_text(path).splitlines(), start=1))
    named = [(number, line) for number, line in stripped if line]
    return [line for _, line in named], {line: number for number, line in named}


def read_requests(path: Path) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """Return the requests of a file, one JSON object a line, and the line of each identifier."""
    from delfast.ledger.requests import read_request

    found: list[Mapping[str, Any]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of '{path}' is no JSON ({one_line(error)}); correct it") from None
        if not isinstance(fields, dict):
            raise InputError(f"expected a JSON object on line {number} of '{path}', got {type(fields).__name__}")
        try:
            ids, reason, due = read_request(fields)
        except InputError as error:
            raise InputError(f"line {number} of '{path}': {error}") from None
        lines.update(dict.fromkeys(ids, number))
        found.append({"ids": ids, "reason": reason, "due": due})
    return found, lines


@contextmanager
def naming_lines(path: Path, lines: Mapping[str, int]) -> Iterator[None]:
    """Add the line of the file to the error of an identifier that cannot be added."""
    from delfast.ledger.identifiers import RefusedIdentifier

    try:
        yield
    except RefusedIdentifier as error:
        raise InputError(f"line {lines[error.identifier]} of '{path}': {error}") from None
