"""Check the form of values that were read from files: the tables of a grid and the records of results."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from delfast.errors import InputError

Kind = Any
"""A type (str, int, float, bool, dict), ``Number``, ``Each``, [kind] for a list, or (kind, None) for a kind or null."""

NAMES: dict[Any, str] = {
    str: "a text", float: "a number", int: "a whole number", bool: "true or false", dict: "a table"
}  # fmt: skip
ANNOTATIONS = {"str": str, "float": float, "int": int, "bool": bool, "Schedule": str}
OF_64_BITS = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Each:
    """A table with any names, whose values are all of one kind."""

    kind: Kind


def check_table(table: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raise InputError for an unknown key and for a value of another kind; a whole number counts as a float."""
    unknown = sorted(table.keys() - kinds.keys())
    if unknown:
        raise InputError(f"{where} has the unknown key {shown(unknown[0])}; expected {', '.join(kinds)}")
    for key, value in table.items():
        _check(value, kinds[key], f"{key} of {where}", "")


def check_record(record: Any, kinds: Mapping[str, Kind], where: str, advice: str) -> None:
    """Raise InputError for a missing key and for a value of another kind.

    A key that ends with "?" may be missing, and other keys are ignored. ``advice`` ends the message.
    """
    _check(record, dict, where, advice)
    for name, kind in kinds.items():
        key = name.removesuffix("?")
        if key not in record:
            if key == name:
                raise InputError(f"expected {where} to have '{key}', it does not{advice}")
        elif isinstance(kind, Mapping):
            check_record(record[key], kind, f"{key} of {where}", advice)
        else:
            _check(record[key], kind, f"{key} of {where}", advice)


def kinds_of(*classes: Any) -> dict[str, Kind]:
    """Return the kind of each field of the dataclasses."""
    return {field.name: _kind(field.type) for each in classes for field in fields(each)}


def _kind(annotation: Any) -> Kind:
    kind = ANNOTATIONS[annotation.removesuffix(" | None")]
    return (kind, None) if annotation.endswith(" | None") else kind


def shown(value: Any) -> str:
    """The value for a message, shortened if it is long or deep."""
    return _SHORT.repr(value)


def _check(value: Any, kind: Kind, where: str, advice: str) -> None:
    if not _fits(value, kind):
        raise InputError(f"expected {where} to be {_described(kind)}, got {shown(value)}{advice}")


def _fits(value: Any, kind: Kind) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and bool(value) and all(_fits(each, kind[0]) for each in value)
    if isinstance(kind, tuple):
        return value is None or _fits(value, kind[0])
    if isinstance(kind, Each):
        return isinstance(value, dict) and all(_fits(each, kind.kind) for each in value.values())
    if isinstance(kind, Number):
        return _fits(value, float) and math.isfinite(value) and kind.low <= value <= kind.high
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and value in OF_64_BITS
    return isinstance(value, kind)


def _described(kind: Kind) -> str:
    if isinstance(kind, list):
        return f"a list, each {_described(kind[0])}"
    if isinstance(kind, tuple):
        return _described(kind[0])
    if isinstance(kind, Each):
        return f"a table, each {_described(kind.kind)}"
    if isinstance(kind, Number):
        bounds = [f"from {kind.low:g}"] * (kind.low > -math.inf) + [f"to {kind.high:g}"] * (kind.high < math.inf)
        return " ".join(["a finite number", *bounds])
    return NAMES[kind]


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, value: int, level: int) -> str:
        return str(value) if value in OF_64_BITS else "an integer of more than 64 bits"


_SHORT = _Short()
