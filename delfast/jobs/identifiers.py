"""The identifiers of a job's training examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from delfast.arguments import describe
from delfast.errors import InputError, is_line


def check_identifiers(given: Any, count: int) -> tuple[str, ...]:
    """Return the identifiers of ``count`` examples as texts. InputError unless each has one of its own."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"expected example_ids() to return a list of texts or ints, got {describe(given)}")
    found = tuple(_identifier(each) for each in given)
    if len(found) != count:
        raise InputError(
            f"expected example_ids() to have one identifier for each of the {count} training examples, got {len(found)}"
        )
    seen = set[str]()
    for each in found:
        if each in seen:
            raise InputError(f"expected example_ids() to be unique, '{each}' occurs twice")
        seen.add(each)
    return found


def _identifier(value: Any) -> str:
    """Return an identifier as text. InputError for another type, and for text that a line of a file cannot hold."""
    if not isinstance(value, (str, Integral)) or isinstance(value, bool):
        raise InputError(f"expected example_ids() to hold texts or ints, got {describe(value)}")
    text = value if isinstance(value, str) else str(int(value))
    if not is_line(text):
        raise InputError(
            f"expected identifiers of printable characters, without white space at the ends, got {describe(text)}"
        )
    return text
