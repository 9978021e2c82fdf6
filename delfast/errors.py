"""The one exception that delfast raises for bad input."""

from __future__ import annotations

from typing import Any, get_args


def printable(text: str) -> str:
    """``text`` as it may be shown on one line: line breaks, escape sequences, changes of the writing direction and
    lone surrogates as Python writes them in a literal (``\\n``, ``\\x1b``, ``\\u202e``).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, what to do. Nothing was changed.

    The line is printable, whatever names of files or parameters it quotes.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in arguments))


def check_choice(what: str, value: object, choices: Any) -> None:
    """InputError unless ``value`` is one of a Literal's values."""
    if not isinstance(value, str) or value not in get_args(choices):
        text = f"'{value}'" if isinstance(value, str) else type(value).__name__
        raise InputError(f"expected {what} to be one of {', '.join(get_args(choices))}; got {text}")
