"""The one exception that delfast raises for bad input."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` as it may be shown on one line: line breaks, escape sequences, changes of the writing direction and
    lone surrogates as Python writes them in a literal (``\\n``, ``\\x1b``, ``\\u202e``).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, what to do. Nothing was changed.

    The line is printable, whatever names of files or parameters it quotes.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in arguments))
