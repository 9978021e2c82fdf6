"""Tables for a terminal and for Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from delfast.errors import printable
from delfast.mask import LayerRow

FIELDS = {
    "forget_acc": "forget acc",
    "retain_acc": "retain acc",
    "test_acc": "test acc",
    "mia": "MIA",
    "delta_forget": "Δ forget",
    "delta_mia": "Δ MIA",
    "delta_test": "Δ test",
    "kl_forget": "KL forget",
    "changed": "changed %",
    "seconds": "seconds",
    "relative_time": "RTE",
}
"""The heading of each measure."""
_LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss", "test_loss": "test loss"}
_ACCURACIES = ("forget_acc", "retain_acc", "test_acc", "mia", "delta_forget", "delta_mia", "delta_test")


def method_table(methods: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns, and a row for each method: its measures, and the sum of its seconds.

    Percentages to two decimals (Δ = oracle - method). Networks that have no accuracy, since a job has a loss of its
    own, have a table of the mean losses, to four digits. A measure that no method has is left out.
    """
    are_losses = not any("forget_acc" in values for values in methods.values())
    fields = _LOSSES if are_losses else {name: FIELDS[name] for name in _ACCURACIES}
    fields = {name: field for name, field in fields.items() if any(name in values for values in methods.values())}
    times = any("seconds" in values for values in methods.values())
    digits = ".4g" if are_losses else ".2f"
    rows = [
        [name]
        + [f"{values[each]:{digits}}" if each in values else "" for each in fields]
        + ([f"{sum(values['seconds'].values()):.1f}" if "seconds" in values else ""] if times else [])
        for name, values in methods.items()
    ]
    return ["method", *fields.values(), *([FIELDS["seconds"]] if times else [])], rows


def selection_words(rows: Sequence[LayerRow]) -> str:
    """Sentences on which layers a mask selects whole, and on the shares of the first and the second half of the layers.

    rows: as ``Mask.table`` returns them; parameters without channels are left out.
    """
    layers = [row for row in rows if row.channel_count]
    whole = [row.name for row in layers if row.channels == row.channel_count]
    first, second = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    early, late = (_share_of_channels(half) for half in (first, second))
    names = f": {', '.join(whole)}" if whole else ""
    text = f"Of {len(layers)} layers, {len(whole)} {'is' if len(whole) == 1 else 'are'} selected whole{names}."
    if first and second:
        text += f" From the input on, {early:.0f} % of the channels of the first half of the layers are selected, and "
        text += f"{late:.0f} % of the second half."
        if early > late and sum(row.total for row in first) < sum(row.total for row in second):
            text += (
                " So it is mainly the early layers that are selected. They have fewer parameters than the late ones, "
                "and the budget counts parameters: all of their channels take little of it."
            )
    return text + " A layer that is selected whole is reset and trained again entirely."


def _share_of_channels(layers: Sequence[LayerRow]) -> float:
    return 100 * sum(row.channels for row in layers) / max(1, sum(row.channel_count for row in layers))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of Markdown cells: the first column aligned to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = ([cell.replace("|", "\\|") for cell in cells] for cells in (columns, rule, *rows))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def markdown_text(text: str) -> str:
    """Markdown that shows ``text`` literally, on one line: no markup, no HTML, no links."""
    # an underscore inside a word needs no escape
    plain = re.sub(r"[\\`*\[\]~$#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("://", ":\\//").replace("www.", "www\\.")  # GitHub turns bare addresses into links


def terminal_text(text: str) -> Text:
    """``text``, shown literally: no rich markup, no escape sequences."""
    return Text(printable(text))


def terminal_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a rich console; names in it are shown as text, whatever they hold."""
    # without vertical rules the nine columns of methods fit into 80 characters
    table = Table(
        title=terminal_text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for position, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if position else "left"
        table.add_column(terminal_text(column), justify=justify, overflow="fold", min_width=None if position else 8)
    for row in rows:
        table.add_row(*map(terminal_text, row))
    return table
