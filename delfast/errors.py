"""The exception that delfast raises for bad input."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` with its unprintable characters escaped, so that it can be printed on one line.

    Line breaks, escape sequences, changes of the writing direction and lone surrogates become what a Python literal has
    (``\\n``, ``\\x1b``, ``\\u202e``).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_line(text: str) -> bool:
    """Return whether a text can stand on a line of a file: printable, not empty, without white space at its ends."""
    return bool(text) and text == text.strip() and text.isprintable()


class InputError(ValueError):
    """Bad input; nothing was changed.

    The message is one line: what was expected, what came, what to do. It is printable, whatever names of files or
    parameters it quotes.

    Parameters
    ----------
    *arguments : object
        The exception's arguments, as for ValueError; unprintable characters of strings are escaped.

    Examples
    --------
    >>> import delfast
    >>> str(delfast.InputError("expected a name, got 'a\\nb'"))
    "expected a name, got 'a\\\\nb'"
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in arguments))
