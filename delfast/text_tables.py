"""Tables as plain text, for print."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of as many cells each as lines of columns, the first column to the left and the others to the right.

    Examples
    --------
    >>> from delfast.text_tables import text_table
    >>> print(text_table([["layer", "channels"], ["conv1", "3 of 16"]]))
    layer  channels
    conv1   3 of 16
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)
