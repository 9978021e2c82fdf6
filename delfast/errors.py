"""The one exception that delfast raises for bad input."""

from __future__ import annotations

from typing import Any, get_args


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, what to do. Nothing was changed."""


def check_choice(what: str, value: object, choices: Any) -> None:
    """InputError unless ``value`` is one of a Literal's values."""
    if not isinstance(value, str) or value not in get_args(choices):
        text = f"'{value}'" if isinstance(value, str) else type(value).__name__
        raise InputError(f"expected {what} to be one of {', '.join(get_args(choices))}; got {text}")
